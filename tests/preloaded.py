"""Programs that start at once, as forks of a process that has imported what takes long to import.

A run script starts a dozen programs, each of which imports torch, fairseq and timm for up to ten seconds:

    python preloaded.py serve SOCKET                    imports, and prints a line when it is ready
    python preloaded.py run SOCKET PROGRAM ARGUMENT...  runs a program as if it were started here

The program `forked-python` is `python -c CODE ARGUMENT...` for code that need not import all that anew.
"""

import atexit
import gc
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

PROGRAMS = {
    "narvl": ("narvl", "main"),
    "fairseq-train": ("fairseq_cli.train", "cli_main"),
    "fairseq-generate": ("fairseq_cli.generate", "cli_main"),
    "fairseq-hydra-train": ("fairseq_cli.hydra_train", "cli_main"),
    "fairseq-validate": ("fairseq_cli.validate", "cli_main"),
    "fairseq-interactive": ("fairseq_cli.interactive", "cli_main"),
    "torchrun": ("torch.distributed.run", "main"),
}
SLOW = (
    *("torch", "torch._dynamo", "fairseq", "timm", "torchvision"),
    *("emoji", "jinja2", "matplotlib.figure", "pycocoevalcap.cider.cider", "sentencepiece", "tokenizers", "typer"),
    *("fairseq.data.data_utils_fast", "fairseq.trainer", "PIL.TiffImagePlugin"),
    "quick_hydra",
)


def serve(address: str) -> NoReturn:
    """Answer each request in a process of its own, for ever."""
    for slow in SLOW:
        importlib.import_module(slow)
    warm_up()
    logging.root.handlers.clear()  # fairseq logs while it is imported; programs set logging up before
    logging.root.setLevel(logging.WARNING)
    gc.freeze()  # or each fork would spend a second on freeing it all when it ends
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            answer(connection)
        connection.close()


def warm_up() -> None:
    """Have configurations composed and their options parsed, which the first of a process takes twice as long for."""
    options = importlib.import_module("fairseq.options")
    utils = importlib.import_module("fairseq.dataclass.utils")
    for parser, words in (
        (options.get_training_parser(), ["data", "--arch", "transformer", "--optimizer", "adam"]),
        (options.get_generation_parser(), ["data", "--path", "none"]),
    ):
        utils.convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, words))


def answer(connection: socket.socket) -> NoReturn:
    """Run a program in a fork, and say its exit status. It is killed if the process that asked for it is."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    program = os.fork()
    if program:
        ended = os.pidfd_open(program)
        readable, _, _ = select.select([connection, ended], [], [])
        if ended not in readable:  # nothing more is sent: the connection's other end is gone
            os.kill(program, signal.SIGKILL)
        _, status = os.waitpid(program, 0)
        with suppress(BrokenPipeError):
            connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    connection.close()
    request = json.loads(message)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.argv = request["words"]
    end_with(run_code if sys.argv[0] == "forked-python" else start)


def start() -> Any:
    """Run the program that sys.argv names, and return what it exits with."""
    module, function = PROGRAMS[sys.argv[0]]
    return getattr(importlib.import_module(module), function)()


def run_code() -> None:
    """Run the code of `forked-python -c CODE ARGUMENT...`."""
    _, option, code, *arguments = sys.argv
    assert option == "-c"
    sys.argv = [option, *arguments]
    exec(code, {"__name__": "__main__"})


def end_with(program: Callable[[], Any]) -> NoReturn:
    """Run a program and end as Python does, but for freeing all objects, each in a copied page: half a second."""
    try:
        sys.exit(program())
    except SystemExit as ending:
        if not isinstance(ending.code, int | None):
            raise
        threading._shutdown()  # type: ignore[attr-defined] # waits for threads, as the interpreter does
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code or 0)


def run(address: str, words: list[str]) -> int:
    """Have a program run with this process's streams, folder and environment, and return its exit status."""
    request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
        status = int(connection.recv(16))
    if status < 0:  # was ended by a signal, and so is this process
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    command, address, *words = sys.argv[1:]
    if command == "serve":
        serve(address)
    else:
        sys.exit(run(address, words))
