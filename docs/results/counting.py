"""Counts the FLOPs and the kernels of models, without running them: ``python docs/results/counting.py``.

The models are on torch's device meta, which keeps shapes and no numbers. Shapes are those of one image of 480 pixels
(nano: 128), 20 queries, and a training step of two images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from narvl_plugin.bench.limit import PROMPT, WORDS, Processor, Work
from narvl_plugin.models import memo
from narvl_plugin.models.registered import build

SIZES = {"nano": 128, "base": 480, "large": 480}
QUERIES = 20
SAMPLES = 2
RATE = Processor(flops=1e12, bandwidth=1e30, launch=0)
"""A GFLOP takes a millisecond, and nothing else takes time."""


class Count(Work):
    """Counts kernels and GFLOPs. A question about values, such as whether a prompt is padded, is answered by no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on shapes and count it."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        return super().__torch_dispatch__(func, types, args, kwargs)


def counted(call: Callable[[], Any]) -> tuple[Any, int, float]:
    """Return the result of a call, its kernels and its GFLOPs."""
    with Count(RATE) as count:
        result = call()
    return result, count.kernels, 1000 * count.busy


def counts(size: str, side: int) -> dict[str, float | str]:
    """Return the parameters of a teacher, in millions, and the GFLOPs and kernels of its parts and its student's."""
    with torch.device("meta"):
        teacher = build(f"ofa_{size}", vocab_size=WORDS).eval()
        student: Any = build(f"narvl_{size}", vocab_size=WORDS + 1, num_queries=QUERIES).eval()
        inputs = {"src_tokens": torch.zeros(1, PROMPT, dtype=torch.long), "patch_images": torch.zeros(1, 3, side, side)}
        with torch.no_grad():
            read, encoder_kernels, encoder = counted(lambda: student.encoder(**inputs))
            _, decoder_kernels, decoder = counted(lambda: student.decoder(None, read))
            known: dict[str, Any] = {}
            read, _, _ = counted(lambda: teacher.encoder(**inputs))

            def step(length: int) -> tuple[Any, int, float]:
                tokens = torch.zeros(1, length, dtype=torch.long)
                return counted(lambda: teacher.decoder(tokens, encoder_out=read, incremental_state=known))

            _, _, first = step(1)  # it also projects the image's positions to keys and values
            _, step_kernels, later = step(2)
        student.train()
        many = {name: value.expand(SAMPLES, *value.shape[1:]) for name, value in inputs.items()}
        _, training_kernels, training = counted(lambda: student(**many)[0].sum().backward())
    return {
        "size": size,
        "parameters": sum(one.numel() for one in teacher.parameters()) / 1e6,
        "encoder_gflop": encoder,
        "decoder_gflop": decoder,
        "keys_gflop": first - later,
        "step_gflop": later,
        "training_gflop": training / SAMPLES,
        "encoder_kernels": encoder_kernels,
        "decoder_kernels": decoder_kernels,
        "step_kernels": step_kernels,
        "training_kernels": training_kernels,
    }


def main() -> None:
    """Print the columns, and a row for each size."""
    memo._autocast_type = lambda device: None  # torch has no autocast on meta
    rows = [counts(size, side) for size, side in SIZES.items()]
    print(json.dumps(list(rows[0])))
    for row in rows:
        print(json.dumps([round(value, 2) if isinstance(value, float) else value for value in row.values()]))


if __name__ == "__main__":
    main()
