"""Where the time of a prediction goes, stage by stage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from narvl_plugin.devices import wait_for
from narvl_plugin.inference.predictor import Predictor

STAGES = {
    "picture": "its row read, its bytes decoded and resized, put on the device",
    "trunk": "the vision trunk",
    "encoder": "the rest of the encoder",
    "decoder": "the decoder, of teachers all of its steps",
    "search": "beam search, or the student's collapse and search",
    "text": "tokens to text",
}


def median_stages(predictor: Predictor, rows: Sequence[int], *, warmup: int) -> dict[str, float]:
    """Return the median time of each of `STAGES`, one row at a time, in ms; the first rows first warm up untimed.

    On a GPU each stage waits for the one before, so that they sum up to more than what is measured of the whole.
    """
    for turn in range(warmup):
        stages(predictor, rows[turn % len(rows)])
    times = [stages(predictor, row) for row in rows]
    return {stage: median(spent[stage] for spent in times) for stage in STAGES}


@torch.inference_mode()
def stages(predictor: Predictor, row: int) -> dict[str, float]:
    """Answer one row and return the time of each of `STAGES`, in ms."""
    spent: Counter[str] = Counter()

    def timed(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed_call(*args: Any, **kwargs: Any) -> Any:
            wait_for(predictor.device)
            start = time.perf_counter()
            result = call(*args, **kwargs)
            wait_for(predictor.device)
            spent[stage] += 1000 * (time.perf_counter() - start)
            return result

        return timed_call

    @contextmanager
    def timing(stage: str, module: Any, method: str) -> Iterator[None]:
        # No forward hook: fairseq's beam search calls `forward` itself, and the trunk is not run by its own.
        setattr(module, method, timed(stage, getattr(module, method)))
        try:
            yield
        finally:
            delattr(module, method)

    encoder, decoder = predictor.model.encoder, predictor.model.decoder
    batch = timed("picture", predictor.batch)(row)
    with (
        timing("trunk", encoder.embed_images, "forward_intermediates"),
        timing("encoder", encoder, "forward"),
        timing("decoder", decoder, "forward"),
    ):
        best = timed("search", predictor.hypotheses)(batch)[0]
    timed("text", predictor.task.codec.decode)(best["tokens"])
    spent["search"] -= spent["encoder"] + spent["decoder"]
    spent["encoder"] -= spent["trunk"]
    return spent
