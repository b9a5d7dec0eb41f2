"""The few repairs that stock fairseq 0.12.3 needs, each with the failing call that it fixes.

One more lives in the tasks, which force --required-batch-size-multiple 1, and one in data/text.py, whose
GPT-2 codec decodes `<bin_7>`.
"""

import functools

from narvl_plugin.importing import leaving_logging_alone
from narvl_plugin.program import write_to_any_terminal

with leaving_logging_alone():
    from narvl_plugin.compat import checkpoints, command_lines, data, generation, precision, programs


def apply() -> None:
    """Repair fairseq, and take the program over that has imported it; once, however often it is called."""
    repair_fairseq()
    take_over_program()


@functools.cache
def repair_fairseq() -> None:
    """Replace functions of fairseq, once, and change nothing else of the process, which may be somebody's notebook."""
    checkpoints.read_checkpoints_safely()
    checkpoints.save_checkpoints_whole()
    checkpoints.copy_checkpoints_whole()
    checkpoints.share_checkpoints_among_processes()
    command_lines.check_command_lines()
    data.accept_files_as_data()
    data.check_place_in_epoch()
    generation.block_repeated_ngrams()
    generation.write_sizes_of_bins()
    precision.unscale_gradients_once()
    programs.begin_and_end_programs()


@functools.cache
def take_over_program() -> None:
    """Decide, once, how the process shows errors, answers to signals, and writes to the terminal: it is a program."""
    programs.show_input_errors_briefly()
    programs.end_briefly_on_signals()
    write_to_any_terminal()
