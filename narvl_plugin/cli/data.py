"""The commands `narvl data …`; each imports what it runs when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from narvl_plugin.data.sources.writing import Outcome, Pictures

app = typer.Typer(no_args_is_help=True)

Raw = Annotated[Path, typer.Option(help="Folder of the unpacked official files.")]
SplitsDir = Annotated[Path, typer.Option(help="Folder for a TSV file per split.")]
Images = Annotated[Path | None, typer.Option(help="Folder with the official folders of images, if not --raw.")]
Splits = Annotated[str | None, typer.Option(help="Comma-separated; by default all of the data set.")]
ImagePaths = Annotated[bool, typer.Option("--image-paths", help="Write the images' paths in place of their bytes.")]
CheckImages = Annotated[bool, typer.Option("--check-images", help="Open each image and drop rows of broken ones.")]


@app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="Folder for TASK/{train,valid,test}.tsv.")],
    train: Annotated[int, typer.Option(help="Pictures to train on.")] = 6000,
    valid: Annotated[int, typer.Option(help="Pictures to validate on.")] = 200,
    test: Annotated[int, typer.Option(help="Pictures to test on, with pairs of objects never trained on.")] = 1000,
    size: Annotated[int, typer.Option(help="Side of the pictures, in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 1,
    nouns: Annotated[int, typer.Option(help="How many nouns to draw, the easiest first.")] = 100,
    max_objects: Annotated[int, typer.Option(help="Most objects in a picture.")] = 4,
    art: Annotated[Path | None, typer.Option(help="Folder of PNG files to draw with.")] = None,
    tasks: Annotated[str, typer.Option(help="Comma-separated: caption, vqa_gen, refcoco, snli_ve.")] = "caption",
) -> None:
    """Compose pictures from emoji art, with captions and rows for the other tasks."""
    from narvl_plugin.data.scenes import write_scenes

    write_scenes(
        out,
        train=train,
        valid=valid,
        test=test,
        size=size,
        seed=seed,
        art=art,
        nouns=nouns,
        max_objects=max_objects,
        tasks=tasks.split(","),
    )


@app.command()
def coco(
    raw: Raw,
    out: SplitsDir,
    images: Images = None,
    splits: Splits = None,
    join_captions: Annotated[bool, typer.Option("--join-captions", help="One row a picture in train, too.")] = False,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """Karpathy's dataset_coco.json, train2014/, val2014/ -> captions: train, val, test."""
    from narvl_plugin.data.sources.coco import convert_coco

    pictures = _pictures(images or raw, image_paths, check_images)
    _tell(convert_coco(raw, out, pictures, splits=_names(splits), join_captions=join_captions))


@app.command()
def vqav2(
    raw: Raw,
    out: SplitsDir,
    images: Images = None,
    splits: Splits = None,
    answers: Annotated[bool, typer.Option("--answers", help="Write trainval_ans2label.pkl, too.")] = False,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """v2_…_questions.json, v2_…_annotations.json, train2014/ … -> questions: train, val, test, test-dev."""
    from narvl_plugin.data.sources.vqav2 import convert_vqav2

    pictures = _pictures(images or raw, image_paths, check_images)
    _tell(convert_vqav2(raw, out, pictures, splits=_names(splits), answers=answers))


@app.command()
def gqa(
    raw: Raw,
    out: SplitsDir,
    images: Images = None,
    splits: Splits = None,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """…_balanced_questions.json, images/ -> questions: train, val, testdev."""
    from narvl_plugin.data.sources.gqa import convert_gqa

    _tell(convert_gqa(raw, out, _pictures(images or raw, image_paths, check_images), splits=_names(splits)))


@app.command()
def refcoco(
    raw: Raw,
    out: SplitsDir,
    name: Annotated[str, typer.Option(help="refcoco, refcoco+ or refcocog.")] = "refcoco",
    split_by: Annotated[str | None, typer.Option(help="unc, google or umd, if not the usual one.")] = None,
    images: Images = None,
    splits: Splits = None,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """NAME/refs(…).p, NAME/instances.json, train2014/ -> boxes: train, val, testA, testB or test."""
    from narvl_plugin.data.sources.refcoco import convert_refcoco

    pictures = _pictures(images or raw, image_paths, check_images)
    _tell(convert_refcoco(raw, out, pictures, name=name, split_by=split_by, splits=_names(splits)))


@app.command()
def snli_ve(
    raw: Raw,
    out: SplitsDir,
    images: Images = None,
    splits: Splits = None,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """snli_ve_….jsonl, flickr30k-images/ -> entailment: train, dev, test."""
    from narvl_plugin.data.sources.snli_ve import convert_snli_ve

    _tell(convert_snli_ve(raw, out, _pictures(images or raw, image_paths, check_images), splits=_names(splits)))


@app.command()
def easy_vqa(
    out: SplitsDir,
    raw: Annotated[Path | None, typer.Option(help="Folder of its files, if not that of the package easy-vqa.")] = None,
    splits: Splits = None,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """The package easy-vqa -> questions: train, val (a tenth of train), test."""
    from narvl_plugin.data.sources.easy_vqa import convert_easy_vqa, packaged_data

    raw = raw or packaged_data()
    _tell(convert_easy_vqa(raw, out, _pictures(raw, image_paths, check_images), splits=_names(splits)))


def _pictures(folder: Path, image_paths: bool, check_images: bool) -> Pictures:
    """Return where a data set's pictures are and how rows hold them."""
    from narvl_plugin.data.sources.writing import Pictures

    return Pictures(folder, as_paths=image_paths, check=check_images)


def _names(joined: str | None) -> list[str] | None:
    """Return the names that commas join."""
    return None if joined is None else joined.split(",")


def _tell(outcomes: Iterator[Outcome]) -> None:
    """Say what became of each file as soon as it is written."""
    for outcome in outcomes:
        print(outcome, flush=True)
