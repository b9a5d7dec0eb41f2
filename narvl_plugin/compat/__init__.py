"""Fixes for bugs of stock fairseq 0.12.3, each with the failing call.

Two fixes are elsewhere: the tasks force --required-batch-size-multiple 1, and the GPT-2 codec in data/text.py decodes
`<bin_7>`.
"""

import functools

from narvl_plugin.importing import leaving_logging_alone
from narvl_plugin.program import write_to_any_terminal

with leaving_logging_alone():
    from narvl_plugin.compat import checkpoints, command_lines, data, distributed, generation, precision, programs


def apply() -> None:
    """Apply all fixes of fairseq, and take over the program. Only the first call has an effect."""
    repair_fairseq()
    take_over_program()


@functools.cache
def repair_fairseq() -> None:
    """Replace functions of fairseq, once. Nothing else in the process changes, because it may be a notebook."""
    checkpoints.read_checkpoints_safely()
    checkpoints.save_checkpoints_whole()
    checkpoints.copy_checkpoints_whole()
    checkpoints.share_checkpoints_among_processes()
    command_lines.check_command_lines()
    data.accept_files_as_data()
    data.check_place_in_epoch()
    distributed.wrap_models_on_cpus()
    generation.block_repeated_ngrams()
    generation.write_sizes_of_bins()
    precision.unscale_gradients_once()
    programs.begin_and_end_programs()


@functools.cache
def take_over_program() -> None:
    """Set up a program, once: how it shows errors, reacts to signals, and writes to the terminal."""
    programs.show_input_errors_briefly()
    programs.end_briefly_on_signals()
    write_to_any_terminal()
