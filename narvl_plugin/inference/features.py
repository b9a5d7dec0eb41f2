"""A frozen vision backbone's features, computed once for each image of a TSV file."""

from __future__ import annotations

import base64
from pathlib import Path

import torch
from torch import Tensor

from narvl_plugin.data import images
from narvl_plugin.data.resumable import SKIPPED, ResumableWriter, fingerprint
from narvl_plugin.data.rewrite import whole_rows
from narvl_plugin.data.scenes.truth import scenes_file
from narvl_plugin.devices import choose_device
from narvl_plugin.errors import BadRow, InputError, SkipBudget
from narvl_plugin.models.config import SIZES, OfaConfig
from narvl_plugin.models.inference import optimise_backbone
from narvl_plugin.models.vision import backbone_features, build_backbone
from narvl_plugin.whole_files import write_whole

BATCH_SIZE = 16
"""Images in a batch. Their largest activations should stay below 32 MiB. Above, the C library requests every block
from the system again, and page faults take most of the time. With images of 128 pixels, one core processes 192 images
a second at batch size 16, 120 at 32, and 102 at 64."""
RGB = 3


def write_features(
    data: Path,
    out: Path,
    *,
    arch: str,
    patch_image_size: int,
    imagenet_normalisation: bool = False,
    image_column: int = 4,
    batch_size: int = BATCH_SIZE,
    skip_bad_rows: int = 0,
    device: str | None = None,
) -> bool:
    r"""Copy `data` to `out` with features in place of images. Training on `out` skips the backbone.

    The image column then holds the base64 of two `.npy` files: the features, float16 (C, size / 16, size / 16), and the
    image's width and height, which boxes need. A stopped run resumes, see `ResumableWriter`. All other columns of a row
    stay as they are, byte by byte. Line ends become `\n`. The content of scenes beside `data` is copied, too.

    Args:
        data: TSV file with images.
        out: TSV file to write.
        arch: architecture of the teacher or student (`narvl_nano`). Its backbone must be pretrained and frozen.
        patch_image_size: side of the square image, in pixels, as in training.
        imagenet_normalisation: whether to normalise by ImageNet's mean and deviation, as in training.
        image_column: number (from 0) of the column with the image.
        batch_size: the number of images in a batch; large batches are not faster, see `BATCH_SIZE`.
        skip_bad_rows: how many bad rows may be skipped, in all parts of a stopped run together.
        device: torch's name of the device; by default a GPU if there is one.

    Returns:
        False if `out` existed already, so nothing was done; else True.

    Raises:
        MissingInput, InputError: if the file or the architecture cannot be used, or another process writes `out`.
        BadRow: if a row has no image column or no image, or features are too large to store, and the skip budget is
            spent.
        StalePart: if an unfinished `out` was begun with other inputs or settings.
    """
    backbone_name = frozen_backbone(arch)
    rows = whole_rows(data)
    writer = ResumableWriter(
        out,
        {
            "data": fingerprint(data),
            "trunk": backbone_name,
            "patch_image_size": patch_image_size,
            "imagenet_normalisation": imagenet_normalisation,
            "image_column": image_column,
            "batch_size": batch_size,
        },
    )
    read_image = images.ImageReader(patch_image_size, imagenet_normalisation=imagenet_normalisation, folder=data.parent)
    read_image.option = "--image-column"
    budget = SkipBudget(skip_bad_rows)
    with writer:
        if writer.finished:
            return False
        budget.charge(writer.counts[SKIPPED])
        if scenes_file(data).is_file():
            write_whole(scenes_file(out), scenes_file(data).read_text(encoding="utf-8"))
        chosen = choose_device(device)
        backbone = build_backbone(backbone_name, pretrained=True).eval().to(chosen)
        optimise_backbone(backbone)
        for batch in writer.batches(len(rows), batch_size, "features"):
            kept: list[tuple[int, list[str]]] = []
            by_column: dict[str, tuple[Tensor, tuple[int, int]]] = {}  # successive rows may share an image
            for row in batch:
                try:
                    columns = rows[row]
                    if not 0 <= image_column < len(columns):
                        raise BadRow(
                            f"{rows.where(row)}: --image-column {image_column}: the row has {len(columns)} columns, "
                            "counted from 0"
                        )
                    column = columns[image_column]
                    if column not in by_column:
                        image, image_size = read_image.with_size(column, rows.where(row))
                        if len(image) != RGB or image_size is None:
                            raise BadRow(f"{rows.where(row)}: the image column holds features already")
                        by_column[column] = image, image_size
                    kept.append((row, columns))
                except BadRow as error:
                    budget.skip(error)
            lines = []
            if kept:
                stacked = torch.stack([image for image, _ in by_column.values()])
                with torch.inference_mode():
                    features = dict(zip(by_column, backbone_features(backbone, stacked.to(chosen)), strict=True))
                encoded: dict[str, str] = {}
                for row, columns in kept:
                    column = columns[image_column]
                    try:
                        if column not in encoded:
                            file = images.encode_features(features[column], by_column[column][1])
                            encoded[column] = base64.b64encode(file).decode("ascii")
                    except ValueError as error:
                        budget.skip(BadRow(f"{rows.where(row)}: {error}"))
                        continue
                    columns[image_column] = encoded[column]
                    lines.append("\t".join(columns))
            skipped = budget.count - writer.counts[SKIPPED]
            writer.append(lines, rows=len(batch), counts={SKIPPED: skipped})
        writer.finish()
    return True


def frozen_backbone(arch: str) -> str:
    """Return the name of an architecture's backbone.

    Raises:
        InputError: if the architecture is unknown, or its backbone is not pretrained and frozen.
    """
    size = arch.partition("_")[2]
    if size not in SIZES:
        known = ", ".join(f"narvl_{known}" for known in SIZES)
        raise InputError(f"--arch {arch}: there is no such architecture; choose one of {known}")
    cfg = OfaConfig(**SIZES[size])
    if not (cfg.vision_pretrained and cfg.freeze_resnet):
        raise InputError(f"--arch {arch}: trains its vision backbone, so its features change and must not be stored")
    return cfg.vision_trunk
