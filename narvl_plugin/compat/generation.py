"""Fixes for generation: repeated n-grams, and the output of fairseq-generate."""

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq_cli import generate

from narvl_plugin.compat.programs import namespaces_of
from narvl_plugin.errors import InputError
from narvl_plugin.generation.teacher import banned_ngrams
from narvl_plugin.whole_files import naming


def block_repeated_ngrams() -> None:
    """Let --no-repeat-ngram-size compare the tokens predicted so far.

    Fixes `NGramRepeatBlock(3)(tokens, lprobs, …, step)`. It compares the output with the end of the token buffer, which
    is still padding. So it never finds a repetition (fairseq issues 4709 and 5206). Its CUDA kernel, if it was built,
    uses the step and works.
    """
    NGramRepeatBlock._no_repeat_ngram = banned_ngrams


def write_sizes_of_bins() -> None:
    """Add the sizes that belong to the <bin_k> to the output file of fairseq-generate.

    Fixes `generate-test.txt` for grounding, which lacks them. Its first line is then `O-`, a tab, and the sizes as
    JSON.
    """
    names = namespaces_of(generate.__name__)[-1]
    names["_main"] = writing_sizes(names["_main"])


def writing_sizes(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return fairseq-generate's function `_main` with that line, and with the output file's name in errors."""

    @functools.wraps(run)
    def run_and_write(cfg: Any, output_file: Any) -> Any:
        if "max_image_size" in cfg.task and not cfg.common_eval.quiet:
            sizes = {name: cfg.task[name] for name in ("num_bins", "max_image_size", "patch_image_size")}
            print(f"O-\t{json.dumps(sizes)}", file=output_file)
        logging.raiseExceptions = False  # if there is no space for a log line, the next result will fail, too
        try:
            with naming(getattr(output_file, "name", "the output")):
                return run(cfg, output_file)
        except InputError:
            if output_file is not sys.stdout:
                with contextlib.suppress(OSError):  # closing tries to write the rest on a full disk, and fails
                    output_file.close()
            raise

    return run_and_write
