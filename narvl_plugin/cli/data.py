"""The commands `narvl data …`. Each imports what it needs only when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from narvl_plugin.cli.options import CheckImages, ImagePaths, Images, Raw, Splits, SplitsDir

if TYPE_CHECKING:
    from narvl_plugin.data.sources.writing import ImageFolder, Outcome

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def scenes(
    out: Annotated[Path, typer.Option(help="Folder for TASK/{train,valid,test}.tsv.")],
    train: Annotated[int, typer.Option(help="Number of images to train on.")] = 6000,
    valid: Annotated[int, typer.Option(help="Number of images to validate on.")] = 200,
    test: Annotated[
        int, typer.Option(help="Number of images to test on. Their pairs of objects are not in training images.")
    ] = 1000,
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed. The same seed gives the same bytes.")] = 1,
    nouns: Annotated[int, typer.Option(help="Number of nouns to draw, the easiest first.")] = 100,
    max_objects: Annotated[int, typer.Option(help="Largest number of objects in an image.")] = 4,
    art: Annotated[Path | None, typer.Option(help="Folder of PNG files to draw with.")] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Any of caption, vqa_gen, refcoco, snli_ve, regions, scene_graph and scene_tree, joined by commas."
        ),
    ] = "caption",
) -> None:
    """Draw scenes of emoji art with rows for each task."""
    from narvl_plugin.data.scenes import write_scenes
    from narvl_plugin.program import end_workers_briefly

    end_workers_briefly()
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
    join_captions: Annotated[
        bool, typer.Option("--join-captions", help="In train, too, write one row per image.")
    ] = False,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """Convert the captions of COCO.

    Reads Karpathy's dataset_coco.json, train2014/ and val2014/. Writes the splits train, val and test.
    """
    from narvl_plugin.data.sources.coco import convert_coco

    folder = _image_folder(images or raw, image_paths, check_images)
    _tell(convert_coco(raw, out, folder, splits=_names(splits), join_captions=join_captions))


@app.command()
def vqav2(
    raw: Raw,
    out: SplitsDir,
    images: Images = None,
    splits: Splits = None,
    answers: Annotated[bool, typer.Option("--answers", help="Also write trainval_ans2label.pkl.")] = False,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """Convert the questions of VQAv2.

    Reads v2_…_questions.json, v2_…_annotations.json and folders such as train2014/. Writes the splits train, val, test
    and test-dev.
    """
    from narvl_plugin.data.sources.vqav2 import convert_vqav2

    folder = _image_folder(images or raw, image_paths, check_images)
    _tell(convert_vqav2(raw, out, folder, splits=_names(splits), answers=answers))


@app.command()
def gqa(
    raw: Raw,
    out: SplitsDir,
    images: Images = None,
    splits: Splits = None,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """Convert the balanced questions of GQA.

    Reads …_balanced_questions.json and images/. Writes the splits train, val and testdev.
    """
    from narvl_plugin.data.sources.gqa import convert_gqa

    _tell(convert_gqa(raw, out, _image_folder(images or raw, image_paths, check_images), splits=_names(splits)))


@app.command()
def refcoco(
    raw: Raw,
    out: SplitsDir,
    name: Annotated[str, typer.Option(help="Name of the data set: refcoco, refcoco+ or refcocog.")] = "refcoco",
    split_by: Annotated[
        str | None, typer.Option(help="Author of the splits, unc, google or umd, if not the usual one.")
    ] = None,
    images: Images = None,
    splits: Splits = None,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """Convert the phrases of RefCOCO, RefCOCO+ or RefCOCOg.

    Reads NAME/refs(…).p, NAME/instances.json and train2014/. Writes the splits train and val, and either test or testA
    and testB.
    """
    from narvl_plugin.data.sources.refcoco import convert_refcoco

    folder = _image_folder(images or raw, image_paths, check_images)
    _tell(convert_refcoco(raw, out, folder, name=name, split_by=split_by, splits=_names(splits)))


@app.command()
def grefcoco(
    raw: Raw,
    out: SplitsDir,
    images: Images = None,
    splits: Splits = None,
    cut_boxes: Annotated[
        bool,
        typer.Option("--cut-boxes", help="Keep rows of more boxes than the task reads, cut to the first ones."),
    ] = False,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """Convert the phrases of gRefCOCO.

    Reads grefcoco/grefs(unc).json, grefcoco/instances.json and train2014/. Writes the splits train, val, testA and
    testB. A row has all boxes of a phrase, or none. Rows of more boxes than the task reads are counted, and dropped or
    cut.
    """
    from narvl_plugin.data.sources.grefcoco import convert_grefcoco

    folder = _image_folder(images or raw, image_paths, check_images)
    _tell(convert_grefcoco(raw, out, folder, splits=_names(splits), cut_boxes=cut_boxes))


@app.command()
def snli_ve(
    raw: Raw,
    out: SplitsDir,
    images: Images = None,
    splits: Splits = None,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """Convert the hypotheses of SNLI-VE.

    Reads snli_ve_….jsonl and flickr30k-images/. Writes the splits train, dev and test.
    """
    from narvl_plugin.data.sources.snli_ve import convert_snli_ve

    _tell(convert_snli_ve(raw, out, _image_folder(images or raw, image_paths, check_images), splits=_names(splits)))


@app.command()
def visual_genome(
    raw: Raw,
    out: SplitsDir,
    images: Images = None,
    splits: Splits = None,
    names: Annotated[
        Path | None,
        typer.Option(help="JSON file of the only nouns and relations to keep, such as VG-SGG-dicts.json."),
    ] = None,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """Convert the relationships of Visual Genome.

    Reads image_data.json, relationships.json, vg_splits.json, and VG_100K/ or VG_100K_2/ or both. Writes the splits
    train, val and test. A row has all triplets of subject, relation and object of an image, with their boxes.
    """
    from narvl_plugin.data.sources.visual_genome import convert_visual_genome

    folder = _image_folder(images or raw, image_paths, check_images)
    _tell(convert_visual_genome(raw, out, folder, splits=_names(splits), names=names))


@app.command()
def easy_vqa(
    out: SplitsDir,
    raw: Annotated[Path | None, typer.Option(help="Folder of the data set's files, if not the package's own.")] = None,
    splits: Splits = None,
    image_paths: ImagePaths = False,
    check_images: CheckImages = False,
) -> None:
    """Convert the questions of the package easy-vqa.

    Writes the splits train, val (a tenth of the official train) and test.
    """
    from narvl_plugin.data.sources.easy_vqa import convert_easy_vqa, packaged_data

    raw = raw or packaged_data()
    _tell(convert_easy_vqa(raw, out, _image_folder(raw, image_paths, check_images), splits=_names(splits)))


def _image_folder(folder: Path, image_paths: bool, check_images: bool) -> ImageFolder:
    """Return where a data set's images are and how rows hold them."""
    from narvl_plugin.data.sources.writing import ImageFolder

    return ImageFolder(folder, as_paths=image_paths, check=check_images)


def _names(joined: str | None) -> list[str] | None:
    """Split names at commas."""
    return None if joined is None else joined.split(",")


def _tell(outcomes: Iterator[Outcome]) -> None:
    """Print the outcome of each file as soon as it is known."""
    for outcome in outcomes:
        print(outcome, flush=True)
