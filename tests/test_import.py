"""That importing the package leaves the settings of the process as they are, as a notebook has made them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import importlib, logging, os, pkgutil, signal, sys, warnings

import matplotlib, numpy, torch


def settings():
    # A filter without a message, for a kind of warning that Python has by itself, changes the user's own warnings.
    own = [f for f in warnings.filters if f[1] is None and f[3] is None and f[2].__module__ == "builtins"]
    return {
        "root level": logging.root.level,
        "root handlers": list(logging.root.handlers),
        "logging disabled": logging.root.manager.disable,
        "warnings.filters": own,
        "warnings.showwarning": warnings.showwarning,
        "torch dtype": torch.get_default_dtype(),
        "torch device": torch.get_default_device(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch gradients": torch.is_grad_enabled(),
        "torch products": torch.get_float32_matmul_precision(),
        "torch determinism": torch.are_deterministic_algorithms_enabled(),
        "torch cuDNN": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "torch random numbers": torch.get_rng_state().tolist(),
        "numpy random numbers": str(numpy.random.get_state()),
        "numpy errors": numpy.geterr(),
        "matplotlib": dict(matplotlib.rcParams.items()),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "folder": os.getcwd(),
        "sys.path": list(sys.path),
    }


def check(module):
    before = settings()
    importlib.import_module(module)
    after = settings()
    changed = [(name, before[name], after[name]) for name in before if before[name] != after[name]]
    assert not changed, (module, changed)


check(sys.argv[1])
import narvl_plugin

for module in pkgutil.walk_packages(narvl_plugin.__path__, "narvl_plugin."):
    check(module.name)
from fairseq.tasks import TASK_REGISTRY

assert "caption" in TASK_REGISTRY
logging.getLogger("PIL.PngImagePlugin").debug("a flood")
logging.getLogger("fairseq").info("a flood")
logging.getLogger("narvl_plugin").warning("a warning")
"""


@pytest.mark.integration
@pytest.mark.parametrize("first", ["narvl_plugin.ctc", "criterions"])
def test_importing_leaves_logging_warnings_and_torch_as_they_are(first: str) -> None:
    """Of each module, in a process that has imported none yet; `sys.excepthook` alone is replaced, by compat/."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, first]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a warning" in done.stderr
    assert "flood" not in done.stderr


@pytest.mark.integration
def test_what_a_user_has_set_of_logging_stays() -> None:
    script = """
import logging
logging.basicConfig(level=logging.ERROR, format="mine: %(message)s")
handlers = list(logging.root.handlers)
import narvl_plugin
assert logging.root.handlers == handlers and logging.root.level == logging.ERROR
logging.getLogger("narvl_plugin").error("here")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "mine: here"
