"""Generation: repeated n-grams, and what fairseq-generate writes."""

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
    """Have --no-repeat-ngram-size look at the words said so far.

    Fixes `NGramRepeatBlock(3)(tokens, lprobs, …, step)`, which compares the end of the token buffer, still
    padding, with what was said, and so never finds a repetition (fairseq issues 4709 and 5206). Its CUDA
    kernel, where built, goes by the step.
    """
    NGramRepeatBlock._no_repeat_ngram = banned_ngrams


def write_sizes_of_bins() -> None:
    """Let the file that fairseq-generate writes say which sizes the <bin_k> in it stand for.

    Fixes what `generate-test.txt` of grounding lacks. Its first line is then `O-`, a tab, and the sizes as JSON.
    """
    names = namespaces_of(generate.__name__)[-1]
    names["_main"] = writing_sizes(names["_main"])


def writing_sizes(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return fairseq-generate's function `_main` with that line, and with an error that names the file it writes."""

    @functools.wraps(run)
    def run_and_write(cfg: Any, output_file: Any) -> Any:
        if cfg.task._name == "refcoco" and not cfg.common_eval.quiet:
            sizes = {name: cfg.task[name] for name in ("num_bins", "max_image_size", "patch_image_size")}
            print(f"O-\t{json.dumps(sizes)}", file=output_file)
        logging.raiseExceptions = False  # of a log line for which there is no space, the next result tells
        try:
            with naming(getattr(output_file, "name", "the output")):
                return run(cfg, output_file)
        except InputError:
            if output_file is not sys.stdout:
                with contextlib.suppress(OSError):  # what a full disk did not take is tried again, and fails once more
                    output_file.close()
            raise

    return run_and_write
