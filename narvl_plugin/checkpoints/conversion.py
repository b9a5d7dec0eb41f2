"""Conversion of checkpoints: teacher to student, more or fewer queries, layouts of OFA and its ports, safetensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from narvl_plugin.checkpoints.finding import existing
from narvl_plugin.checkpoints.record import LAYOUTS, Checkpoint
from narvl_plugin.checkpoints.weight_files import SAFETENSORS_SUFFIX
from narvl_plugin.errors import InputError
from narvl_plugin.whole_files import require_writable


def convert(
    source: Path,
    out: Path,
    *,
    arch: str | None = None,
    num_queries: int | None = None,
    member: str | None = None,
    to: str = "narvl",
    ema: bool = False,
    slim: bool = False,
    allow: Sequence[str] = (),
    bpe_dir: Path | None = None,
) -> list[str]:
    """Write the weights and the configuration of a checkpoint to another file, without its training state.

    Args:
        source: a checkpoint of fairseq-train, a published one of OFA or of the authors' parallel model,
            NAME.safetensors with NAME.json beside it, or a port of OFA: a folder or `hf://OWNER/NAME`.
        out: the file to write; for NAME.safetensors, the configuration goes into NAME.json. With `to="huggingface"`,
            the folder to write, which must not exist or be empty.
        arch: the architecture to write, such as `narvl_base` from a teacher; by default the source's.
        num_queries: a student's N; by default the source's, or the configuration's if the source is a teacher.
        member: the member to keep, for a student that was trained on a mixture of tasks.
        to: the layout: `narvl`; or, for a teacher, `ofa` for that of OFA's files, or `huggingface` for that of its
            Hugging Face and ModelScope ports.
        ema: whether to use the averaged weights of the checkpoint.
        slim: whether to write weights in 16 bits, without a frozen backbone that comes from a package.
        allow: names, or shell patterns of names, of tensors that may be missing, left over or of another shape.
        bpe_dir: the folder of the vocabulary that a port gets; by default the one that the checkpoint names, or its own
            folder.

    Returns:
        A line for each tensor that is new, unused or reshaped.

    Raises:
        MissingInput, InputError: if the source cannot be read, or holds another model than `arch`.
    """
    if to not in LAYOUTS:
        raise InputError(f"--to {to}: choose {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}")
    to_folder = to == "huggingface"
    if bpe_dir is not None and not to_folder:
        raise InputError(f"--bpe-dir {bpe_dir}: is for --to huggingface, which writes the vocabulary, too")
    source = existing(source)
    if to_folder and out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: is not empty; give a new folder")
    if out.is_file() and out.samefile(source):
        raise InputError(f"{out}: is the source; write to another file")
    require_writable(out, folder=to_folder)
    if out.suffix == SAFETENSORS_SUFFIX and not to_folder:
        require_writable(out.with_suffix(".json"))
    checkpoint = Checkpoint.read(source, averaged=ema)
    if member is not None:
        checkpoint = checkpoint.of_member(member)
    if to != "narvl" and not (arch or checkpoint.family).startswith("ofa"):
        raise InputError(f"{source}: is a student; the layouts of OFA and its ports are for teachers")
    if to == "ofa" and out.suffix == SAFETENSORS_SUFFIX:
        raise InputError(f"{out}: OFA's layout is a checkpoint of torch; name it .pt")
    vocabulary = (bpe_dir or checkpoint.vocabulary) if to_folder else None
    if to_folder and vocabulary is None:
        raise InputError(f"{source}: does not name a vocabulary that is there; give the folder with it by --bpe-dir")
    fitted, notes = checkpoint.fit(arch=arch, num_queries=num_queries, allow=allow)
    (fitted.slim() if slim else fitted).write(out, to=to, vocabulary=vocabulary)
    return notes
