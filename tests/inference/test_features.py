"""Precomputed features: what the trunk gives, where the image was, and the same output of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.images import ImageReader
from narvl_plugin.data.regions import RegionsDataset
from narvl_plugin.data.resumable import ResumableWriter
from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.data.scenes.truth import scenes_file
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError, SkipBudget
from narvl_plugin.inference import features
from narvl_plugin.inference.features import frozen_backbone, write_features
from narvl_plugin.models import build
from narvl_plugin.models.vision import backbone_features
from narvl_plugin.whole_files import sole_writer

SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSV file with five scenes."""
    folder = tmp_path_factory.mktemp("features")
    write_scenes(folder, train=5, valid=0, test=0, size=SIZE, seed=3, nouns=8, max_objects=1)
    return folder / "caption" / "train.tsv"


OPTIONS = {"arch": "narvl_nano", "patch_image_size": SIZE, "batch_size": 2}
NO_IMAGE = b"x\tx\twords\t\tbm90IGFuIGltYWdl"


def columns(path: Path) -> list[list[str]]:
    """Read a TSV file."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_model_says_the_same_of_features_as_of_the_image(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "features.tsv"
    assert write_features(data, out, arch="narvl_nano", patch_image_size=SIZE, batch_size=2)
    images, features = columns(data), columns(out)
    assert [row[:4] for row in features] == [row[:4] for row in images]
    assert scenes_file(out).read_bytes() == scenes_file(data).read_bytes()

    torch.manual_seed(0)
    model = build("narvl_nano", vocab_size=30, num_queries=4).eval()
    read = ImageReader(SIZE)
    for row, feature in zip(images, features, strict=True):
        pixels, precomputed = read(row[4], "test:1"), read(feature[4], "test:1")
        assert pixels.shape == (3, SIZE, SIZE)
        assert read.with_size(feature[4], "test:1")[1] == (SIZE, SIZE)
        assert precomputed.shape == (model.encoder.embed_images.out_channels, SIZE // 16, SIZE // 16)
        source = torch.tensor([[0, 5, 2]])
        with torch.no_grad():
            seen = [model(src_tokens=source, patch_images=image[None])[0] for image in (pixels, precomputed)]
        torch.testing.assert_close(seen[0], seen[1], atol=5e-3, rtol=5e-3)  # they are stored in half precision
    assert not write_features(data, out, arch="narvl_nano", patch_image_size=SIZE)
    with pytest.raises(BadRow, match=r"features.tsv:1: the image column holds features already"):
        write_features(out, tmp_path / "again.tsv", arch="narvl_nano", patch_image_size=SIZE)


def test_sets_of_boxes_stay_and_are_read_with_the_features(tmp_path: Path, codec: TextCodec) -> None:
    write_scenes(tmp_path, train=12, valid=0, test=0, size=SIZE, nouns=8, tasks=("regions",))
    data, out = tmp_path / "regions" / "train.tsv", tmp_path / "features.tsv"
    assert write_features(data, out, **OPTIONS)
    options = DatasetOptions(codec, SIZE, 20, 4, False, SkipBudget(0))
    images, features = (RegionsDataset(TsvFile(f, "0,4,2,3"), options, "train", max_image_size=64) for f in (data, out))
    numbers = set()
    for row in range(12):
        image, feature = images.sample(row), features.sample(row)
        numbers.add(len(image["region_coord"]))
        assert image["patch_image"].shape != feature["patch_image"].shape
        assert all(torch.equal(image[key], feature[key]) for key in ("target", "region_coord", "w_resize_ratio"))
    assert 0 in numbers and len(numbers) > 2


def test_rows_that_share_an_image_share_its_features(data: Path, tmp_path: Path) -> None:
    first, second, *_ = data.read_text(encoding="utf-8").splitlines()
    (tmp_path / "twice.tsv").write_text("\n".join([first, first, second, first]) + "\n", encoding="utf-8")
    for batch_size in (1, 4):
        out = tmp_path / f"{batch_size}.tsv"
        write_features(tmp_path / "twice.tsv", out, arch="narvl_nano", patch_image_size=SIZE, batch_size=batch_size)
        seen = [row[4] for row in columns(out)]
        assert seen[0] == seen[1] == seen[3] != seen[2]


def test_a_row_without_an_image_is_named_or_left_out(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tsv"
    lines = data.read_text(encoding="utf-8").splitlines()
    bad.write_text("\n".join([lines[0], "x\tx\twords\t\tbm90IGFuIGltYWdl", *lines[1:]]) + "\n", encoding="utf-8")
    options = {"arch": "narvl_nano", "patch_image_size": SIZE, "batch_size": 2}
    with pytest.raises(BadRow, match=r"bad.tsv:2: .*image"):
        write_features(bad, tmp_path / "strict.tsv", **options)
    write_features(bad, tmp_path / "lenient.tsv", skip_bad_rows=1, **options)
    assert [row[0] for row in columns(tmp_path / "lenient.tsv")] == [line.split("\t")[0] for line in lines]


def test_a_column_of_something_else_is_named_by_the_option_of_this_command(data: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRow, match=r"in.tsv:1: the image .*; check --image-column"):
        write_features(data, tmp_path / "out.tsv", arch="narvl_nano", patch_image_size=SIZE, image_column=2)


def test_only_a_frozen_trunk_has_features_to_keep() -> None:
    assert frozen_backbone("narvl_nano") == frozen_backbone("ofa_nano")
    with pytest.raises(InputError, match="narvl_base: trains its vision backbone"):
        frozen_backbone("narvl_base")
    with pytest.raises(InputError, match="narvl_giant: there is no such architecture"):
        frozen_backbone("narvl_giant")


def test_a_column_that_is_not_there_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--image-column 7: .* has 5 columns"):
        write_features(data, tmp_path / "out.tsv", arch="narvl_nano", patch_image_size=SIZE, image_column=7)


def test_a_second_process_is_refused(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.tsv"
    with sole_writer(out), pytest.raises(InputError, match="out.tsv: process .* is writing it"):
        write_features(data, out, **OPTIONS)
    assert write_features(data, out, **OPTIONS)
    with sole_writer(out):  # a finished file is told of without the lock
        assert not write_features(data, out, **OPTIONS)


def test_columns_that_nobody_reads_stay_as_they_are(data: Path, tmp_path: Path) -> None:
    """Rows have differing numbers of columns, also more than the first, and bytes that are no UTF-8."""
    lines = data.read_bytes().splitlines()
    tails = [b"", b"\tmore\t\t", b"\tcaf\xe9\tand\rmore", b"\t", b"\t\xff\xfe"]
    (tmp_path / "in.tsv").write_bytes(b"\r\n".join(line + tail for line, tail in zip(lines, tails, strict=True)))
    write_features(tmp_path / "in.tsv", tmp_path / "out.tsv", **OPTIONS)
    written = (tmp_path / "out.tsv").read_bytes().split(b"\n")
    assert written.pop() == b""
    for line, new, tail in zip(lines, written, tails, strict=True):
        old_fields, new_fields = (line + tail).split(b"\t"), new.split(b"\t")
        assert new_fields[:4] + new_fields[5:] == old_fields[:4] + old_fields[5:]
        assert new_fields[4] != old_fields[4]


def test_a_row_that_lacks_the_image_column_is_bad_also_as_the_first(data: Path, tmp_path: Path) -> None:
    (tmp_path / "in.tsv").write_bytes(b"too\tfew\n" + data.read_bytes())
    with pytest.raises(BadRow, match=r"in.tsv:1: --image-column 4: the row has 2 columns"):
        write_features(tmp_path / "in.tsv", tmp_path / "strict.tsv", **OPTIONS)
    write_features(tmp_path / "in.tsv", tmp_path / "out.tsv", skip_bad_rows=1, **OPTIONS)
    assert [row[0] for row in columns(tmp_path / "out.tsv")] == [row[0] for row in columns(data)]


@pytest.mark.integration
def test_the_skip_budget_is_that_of_all_parts_of_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run does not get it anew, and one that spent it goes on with a larger one, to the same bytes."""
    lines = data.read_bytes().splitlines()
    (tmp_path / "in.tsv").write_bytes(b"\n".join([lines[0], NO_IMAGE, *lines[1:4], NO_IMAGE, lines[4]]) + b"\n")
    write_features(tmp_path / "in.tsv", tmp_path / "whole.tsv", skip_bad_rows=2, **OPTIONS)
    append = ResumableWriter.append

    def append_one(self: ResumableWriter, *arguments: Any, **options: Any) -> None:
        append(self, *arguments, **options)
        raise KeyboardInterrupt

    out = tmp_path / "out.tsv"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResumableWriter, "append", append_one)
        write_features(tmp_path / "in.tsv", out, skip_bad_rows=1, **OPTIONS)
    for _ in range(2):
        with pytest.raises(BadRow, match=r"in.tsv:6: .*\(now 1\)"):
            write_features(tmp_path / "in.tsv", out, skip_bad_rows=1, **OPTIONS)
    with pytest.raises(InputError, match="--skip-bad-rows 0: 1 rows were skipped before"):
        write_features(tmp_path / "in.tsv", out, **OPTIONS)
    assert write_features(tmp_path / "in.tsv", out, skip_bad_rows=2, **OPTIONS)
    assert out.read_bytes() == (tmp_path / "whole.tsv").read_bytes()


def test_features_too_large_to_be_stored_are_bad_rows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of such an image is named, and its neighbours in the batch are written as before."""
    lines = data.read_bytes().splitlines()
    (tmp_path / "in.tsv").write_bytes(b"\n".join([lines[0], lines[1], lines[2], lines[1]]) + b"\n")
    options = {**OPTIONS, "batch_size": 4}
    write_features(tmp_path / "in.tsv", tmp_path / "whole.tsv", **options)

    def overflowing(backbone: Any, images: torch.Tensor) -> torch.Tensor:
        found = backbone_features(backbone, images)
        found[1, 0, 0, 0] = 1e5
        return found

    monkeypatch.setattr(features, "backbone_features", overflowing)
    with pytest.raises(BadRow, match=r"in.tsv:2: the features of the image are up to 1e[+]05"):
        write_features(tmp_path / "in.tsv", tmp_path / "strict.tsv", **options)
    with pytest.raises(BadRow, match=r"in.tsv:4: the features of the image are up to 1e[+]05"):
        write_features(tmp_path / "in.tsv", tmp_path / "less.tsv", skip_bad_rows=1, **options)
    write_features(tmp_path / "in.tsv", tmp_path / "out.tsv", skip_bad_rows=2, **options)
    whole = columns(tmp_path / "whole.tsv")
    assert columns(tmp_path / "out.tsv") == [whole[0], whole[2]]
