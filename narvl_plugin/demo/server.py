"""The server of the page: an address of this machine, one process, nothing kept when it ends."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from narvl_plugin.api import load
from narvl_plugin.demo.examples import draw_examples
from narvl_plugin.errors import InputError

CONNECTIONS = 64
"""Largest number of connections at one time; a browser opens about six."""
PATIENCE = 1
"""Time that open connections have to end when the server does, in seconds."""


def serve(
    checkpoint: Path | None = None,
    *,
    teacher: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    bpe_dir: Path | None = None,
    device: str | None = None,
    ngram_automaton: Path | None = None,
    ngram_weight: float = 0.2,
) -> None:
    """Serve the page until the program is asked to end.

    Args:
        checkpoint: see `narvl.load`; None is the model in the box.
        teacher: a teacher to show beside it.
        host: the address to listen at.
        port: the port; 0 takes a free one.
        bpe_dir: the vocabulary's folder; by default the one that the checkpoints name.
        device: torch's name of it; by default a GPU if there is one.
        ngram_automaton: see `narvl.load`; for the captions of the student.
        ngram_weight: see `narvl.load`.

    Raises:
        InputError: if the port cannot be used, or Gradio is not installed.
        MissingInput, InputError: if a checkpoint or its vocabulary cannot be used.
    """
    with listening(host, port) as listener, tempfile.TemporaryDirectory(prefix="narvl-demo-") as folder:
        # Gradio reads its settings when it is imported. It sends no statistics, and keeps files in this folder only.
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_EXAMPLES_CACHE": folder,
            "HF_HUB_OFFLINE": "1",
        }
        try:
            import gradio  # noqa: F401
        except ImportError:
            raise InputError("narvl demo needs the package gradio; pip install 'narvl[demo]'") from None
        import uvicorn
        from fastapi import FastAPI
        from starlette.middleware import Middleware

        from narvl_plugin.demo.gate import LOOPBACK, Gate
        from narvl_plugin.demo.page import build_page, mount

        given = {"Student": checkpoint, "Teacher": teacher} if teacher is not None else {"Model": checkpoint}
        common: dict[str, Any] = {"bpe_dir": bpe_dir, "device": device}
        ngrams: dict[str, Any] = {"ngram_automaton": ngram_automaton, "ngram_weight": ngram_weight}
        models = {name: load(file, **common, **({} if name == "Teacher" else ngrams)) for name, file in given.items()}
        page = build_page(models, draw_examples())
        gate = Middleware(Gate, uploads=Path(folder), local=host in LOOPBACK)
        app = FastAPI(middleware=[gate], docs_url=None, redoc_url=None, openapi_url=None)
        mount(app, page)
        name = f"[{host}]" if ":" in host else host
        print(f"http://{name}:{listener.getsockname()[1]} (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(
            app, log_level="critical", limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=PATIENCE
        )
        uvicorn.Server(config).run([listener])


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        InputError: if it cannot.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or a port is taken for a while after its use
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise InputError(
            f"--host {host} --port {port}: cannot be listened at ({error.strerror}); choose another by --port or --host"
        ) from error
    return listener
