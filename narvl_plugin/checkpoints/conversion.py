"""Conversion of checkpoints: teacher to student, more or fewer queries, OFA's layout, safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from narvl_plugin.checkpoints.reading import SAFETENSORS_SUFFIX
from narvl_plugin.checkpoints.record import Checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.whole_files import require_writable


def convert(
    source: Path,
    out: Path,
    *,
    arch: str | None = None,
    num_queries: int | None = None,
    member: str | None = None,
    to_ofa: bool = False,
    ema: bool = False,
    slim: bool = False,
    allow: Sequence[str] = (),
) -> list[str]:
    """Write the weights and the configuration of a checkpoint to another file, without its training state.

    Args:
        source: a checkpoint of fairseq-train, a published one of OFA or of the authors' parallel model, or
            NAME.safetensors with NAME.json beside it.
        out: the file to write; for NAME.safetensors, the configuration goes into NAME.json.
        arch: the architecture to write, such as `narvl_base` from a teacher; by default the source's.
        num_queries: a student's N; by default the source's, or the configuration's if the source is a teacher.
        member: the member to keep, for a student that was trained on a mixture of tasks.
        to_ofa: whether to write a teacher in OFA's layout.
        ema: whether to use the averaged weights of the checkpoint.
        slim: whether to write weights in 16 bits, without a frozen backbone that comes from a package.
        allow: names, or shell patterns of names, of tensors that may be missing, left over or of another shape.

    Returns:
        A line for each tensor that is new, unused or reshaped.

    Raises:
        MissingInput, InputError: if the source cannot be read, or holds another model than `arch`.
    """
    if out.exists() and out.samefile(source):
        raise InputError(f"{out}: is the source; write to another file")
    require_writable(out)
    if out.suffix == SAFETENSORS_SUFFIX:
        require_writable(out.with_suffix(".json"))
    checkpoint = Checkpoint.read(source, averaged=ema)
    if member is not None:
        checkpoint = checkpoint.of_member(member)
    if to_ofa and not (arch or checkpoint.family).startswith("ofa"):
        raise InputError(f"{source}: is a student; OFA's layout is for teachers")
    if to_ofa and out.suffix == SAFETENSORS_SUFFIX:
        raise InputError(f"{out}: OFA's layout is a checkpoint of torch; name it .pt")
    fitted, notes = checkpoint.fit(arch=arch, num_queries=num_queries, allow=allow)
    (fitted.slim() if slim else fitted).write(out, to_ofa=to_ofa)
    return notes
