"""Repairs of fairseq alone, as somebody's notebook may have them: the rest of the process stays as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# The package's parts without its __init__, which takes over programs.
SCRIPT = """
import importlib.util, io, signal, sys, types
from types import SimpleNamespace

package = types.ModuleType("narvl_plugin")
package.__path__ = list(importlib.util.find_spec("narvl_plugin").submodule_search_locations)
sys.modules["narvl_plugin"] = package
sys.stdout.reconfigure(errors="strict")

import torch
from fairseq import options
from fairseq.dataclass.configs import CommonConfig, DistributedTrainingConfig
from fairseq.distributed import utils
from torch.utils.data._utils import worker
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter


def settings():
    return {
        "excepthook": sys.excepthook,
        "unraisablehook": sys.unraisablehook,
        "stdout": (sys.stdout, sys.stdout.errors),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "data workers": (worker._worker_loop, _MultiProcessingDataLoaderIter.__del__),
    }


def use():
    training = DistributedTrainingConfig(distributed_world_size=1)
    utils.call_main(SimpleNamespace(distributed_training=training, common=CommonConfig()), lambda cfg: None)
    words = ["data", "--task", "translation", "--path", "a.pt"]
    options.parse_args_and_arch(options.get_generation_parser(), words)


before = settings()
from narvl_plugin import compat

call_main, parse = utils.call_main, options.parse_args_and_arch
compat.repair_fairseq()
assert call_main is not utils.call_main and parse is not options.parse_args_and_arch
use()
after = settings()
print([name for name in before if before[name] != after[name]])

compat.take_over_program()
use()
after = settings()
print([name for name in before if before[name] != after[name]])
print([number for number in before["signals"] if before["signals"][number] != after["signals"][number]])
"""


@pytest.mark.integration
def test_repairs_of_fairseq_leave_the_process_as_it_is() -> None:
    """Also when functions of fairseq are called then; a program that is taken over changes all but one of these."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    repaired, taken_over, signals = done.stdout.splitlines()
    assert repaired == "[]"
    assert taken_over == "['excepthook', 'stdout', 'signals', 'data workers']"
    assert signals == "[<Signals.SIGTERM: 15>]"
