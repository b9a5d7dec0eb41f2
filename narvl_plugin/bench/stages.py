"""The time of a prediction, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from narvl_plugin.devices import wait_for
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.ofa import OfaModel

STAGES = {
    "picture": "reading the row, decoding and resizing the image, moving it to the device",
    "trunk": "the vision backbone",
    "encoder": "the rest of the encoder",
    "decoder": "the decoder; all of its steps for a teacher",
    "search": "beam search, or the student's collapse and search",
    "text": "tokens to text",
}


def median_stages(predictor: Predictor, rows: Sequence[int], *, warmup: int) -> dict[str, float]:
    """Return the median time of each of `STAGES`, one row at a time, in ms.

    On a GPU, each stage is synchronised, so the stages sum to more than the time of the whole prediction.

    Args:
        predictor: the model and its data.
        rows: the rows to predict.
        warmup: the number of untimed predictions before the measurement.

    Returns:
        The times by stage.
    """
    for turn in range(warmup):
        stages(predictor, rows[turn % len(rows)])
    times = [stages(predictor, row) for row in rows]
    return {stage: median(spent[stage] for spent in times) for stage in STAGES}


@torch.inference_mode()
def stages(predictor: Predictor, row: int) -> dict[str, float]:
    """Predict one row and return the time of each of `STAGES`, in ms."""
    spent = dict.fromkeys(STAGES, 0.0)

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
        # No forward hook: fairseq's beam search calls `forward` directly, and the backbone runs another method.
        setattr(module, method, timed(stage, getattr(module, method)))
        try:
            yield
        finally:
            delattr(module, method)

    encoder, decoder = predictor.model.encoder, predictor.model.decoder
    batch = timed("picture", predictor.batch)(row)
    with (
        _started_one_by_one(predictor.model),
        timing("trunk", encoder.embed_images, "forward_intermediates"),
        timing("encoder", encoder, "forward"),
        timing("decoder", decoder, "forward"),
    ):
        best = timed("search", predictor.hypotheses)(batch)[0]
    timed("text", predictor.task.codec.decode)(best["tokens"])
    spent["search"] -= spent["encoder"] + spent["decoder"]
    spent["encoder"] -= spent["trunk"]
    return spent


@contextmanager
def _started_one_by_one(model: OfaModel) -> Iterator[None]:
    """Run a model without graphs in the block, because a graph has no stages."""
    graphs, exported = model.graphs, model.exported
    model.graphs = model.exported = None
    try:
        yield
    finally:
        model.graphs, model.exported = graphs, exported
