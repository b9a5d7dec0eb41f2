"""fairseq's options of generation by name."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from narvl_plugin.errors import InputError

NAMES = frozenset(
    (
        *("beam", "beam_mt", "nbest", "max_len_a", "max_len_b"),
        *("max_len_a_mt", "max_len_b_mt", "min_len", "match_source_len", "unnormalized"),
        *("no_early_stop", "no_beamable_mm", "lenpen", "lenpen_mt", "unkpen"),
        *("replace_unk", "sacrebleu", "score_reference", "prefix_size", "no_repeat_ngram_size"),
        *("sampling", "sampling_topk", "sampling_topp", "constraints", "temperature"),
        *("diverse_beam_groups", "diverse_beam_strength", "diversity_rate", "print_alignment", "print_step"),
        *("lm_path", "lm_weight", "iter_decode_eos_penalty", "iter_decode_max_iter", "iter_decode_force_max_iter"),
        *("iter_decode_with_beam", "iter_decode_with_external_reranker", "retain_iter_history", "retain_dropout"),
        *("retain_dropout_modules", "decoding_format", "no_seed_provided", "eos_token"),
    )
)
"""All options of generation (fairseq's `GenerationConfig`)."""
DEFAULTS: dict[str, Any] = {
    "beam": 5,
    "nbest": 1,
    "min_len": 1,
    "max_len_a": 0,
    "max_len_b": 200,
    "no_repeat_ngram_size": 0,
    "print_alignment": None,
}
"""fairseq's defaults of the options that our own searches read."""


def generation_config(options: Mapping[str, Any]) -> Namespace:
    """Return options of generation in fairseq's form, with defaults for the options that our searches read.

    Raises:
        InputError: if fairseq has no option of such a name.
    """
    for name, value in options.items():
        if name not in NAMES:
            raise InputError(f"fairseq has no generation option {name}={value!r}; see fairseq-generate --help")
    return Namespace(**DEFAULTS | dict(options))
