"""The commands of the program `narvl`; each imports what it runs when it runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import narvl_command
from narvl_plugin.errors import InputError

if TYPE_CHECKING:
    from narvl_plugin.data.sources.writing import Outcome, Pictures

SETTINGS_FILE = "settings.txt"
"""Where a run script keeps its settings in the run's folder, as lines KEY=value."""

app = typer.Typer(
    help="Parallel vision-language models with Query-CTC: data, distillation, latency and report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(no_args_is_help=True)
bench_app = typer.Typer(no_args_is_help=True)
app.add_typer(data_app, name="data", help="Make data sets.")
app.add_typer(bench_app, name="bench", help="Measure what models cost.")

Benchmark = Annotated[str, typer.Option("--task", help="caption, vqa, gqa, refcoco or snli_ve.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
BpeDir = Annotated[Path | None, typer.Option(help="Vocabulary's folder, if not the one the checkpoint names.")]
Ans2LabelFile = Annotated[Path | None, typer.Option(help="List of answers, if not where the checkpoint says.")]
Device = Annotated[str | None, typer.Option(help="torch's name of it; by default a GPU if there is one.")]
MaxLenB = Annotated[
    int | None, typer.Option(min=1, help="Longest output of the teacher, in tokens, if not as in its --eval-args.")
]
NoRepeat = Annotated[
    int | None,
    typer.Option(min=0, help="Length of n-grams that the teacher says once only; 0: any; if not as in --eval-args."),
]
Raw = Annotated[Path, typer.Option(help="Folder of the unpacked official files.")]
SplitsDir = Annotated[Path, typer.Option(help="Folder for a TSV file per split.")]
Images = Annotated[Path | None, typer.Option(help="Folder with the official folders of images, if not --raw.")]
Splits = Annotated[str | None, typer.Option(help="Comma-separated; by default all of the data set.")]
ImagePaths = Annotated[bool, typer.Option("--image-paths", help="Write the images' paths in place of their bytes.")]
CheckImages = Annotated[bool, typer.Option("--check-images", help="Open each image and drop rows of broken ones.")]
SkipBadRows = Annotated[int, typer.Option(min=0, help="How many rows that cannot be used are left out.")]


@app.command()
def path() -> None:
    """Print the folder of the plugin: fairseq-train --user-dir "$(narvl path)" ..."""
    print(narvl_command.plugin_folder())


@data_app.command()
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


@data_app.command()
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


@data_app.command()
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


@data_app.command()
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


@data_app.command()
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


@data_app.command()
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


@data_app.command()
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


@app.command()
def vocab(
    data: Annotated[Path, typer.Argument(help="TSV file to train on.")],
    out: Annotated[Path, typer.Option(help="Folder for spm.model, to be used as --bpe-dir.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Most pieces to learn.")] = 1000,
    column: Annotated[
        str,
        typer.Option(
            help="Numbers (from 0) of the columns with what models read and say: 2 of captions and regions, 2,3 of "
            "questions, 3,4,5 of entailment."
        ),
    ] = "2",
) -> None:
    """Train a small sentencepiece vocabulary on the text of a TSV file."""
    from narvl_plugin.data.text import train_sentencepiece

    print(train_sentencepiece(data, column, out, vocab_size))


@app.command()
def features(
    data: Annotated[Path, typer.Argument(help="TSV file with pictures.")],
    out: Annotated[Path, typer.Argument(help="TSV file to write.")],
    arch: Annotated[str, typer.Option(help="Architecture whose trunk is frozen.")] = "narvl_nano",
    patch_image_size: Annotated[int, typer.Option(min=16, help="Side of the square picture, in pixels.")] = 128,
    imagenet_default_mean_and_std: Annotated[
        bool, typer.Option(help="Normalise by ImageNet's mean and deviation, if training does.")
    ] = False,
    image_column: Annotated[int, typer.Option(min=0, help="Number (from 0) of the column with the picture.")] = 4,
    batch_size: BatchSize = 16,
    skip_bad_rows: SkipBadRows = 0,
    device: Device = None,
) -> None:
    """Compute a frozen vision trunk's features once for each picture, for quick training."""
    from narvl_plugin.features import write_features

    written = write_features(
        data,
        out,
        arch=arch,
        patch_image_size=patch_image_size,
        imagenet_normalisation=imagenet_default_mean_and_std,
        image_column=image_column,
        batch_size=batch_size,
        skip_bad_rows=skip_bad_rows,
        device=device,
    )
    _say(out, written)


@app.command()
def distill(
    teacher: Annotated[Path, typer.Option(help="Checkpoint of the teacher.")],
    data: Annotated[Path, typer.Option(help="TSV file with pictures or their features.")],
    out: Annotated[Path, typer.Option(help="TSV file to write, in the same columns.")],
    beam: Annotated[int, typer.Option(min=1, help="Width of the beam search.")] = 5,
    nbest: Annotated[int, typer.Option(min=1, help="Captions to write, joined by &&.")] = 1,
    batch_size: BatchSize = 32,
    keep_references: Annotated[bool, typer.Option(help="Write the original rows, too.")] = False,
    max_len_b: MaxLenB = None,
    no_repeat_ngram_size: NoRepeat = None,
    val_inference_type: Annotated[
        str | None, typer.Option(help="How answers are found: allcand or beamsearch, if not the checkpoint's way.")
    ] = None,
    skip_bad_rows: SkipBadRows = 0,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    device: Device = None,
) -> None:
    """Put a teacher's outputs in place of a TSV file's targets; stopped and started again, it goes on."""
    from narvl_plugin.distill import distill

    written = distill(
        teacher=teacher,
        data=data,
        out=out,
        beam=beam,
        nbest=nbest,
        batch_size=batch_size,
        keep_references=keep_references,
        max_len_b=max_len_b,
        no_repeat_ngram_size=no_repeat_ngram_size,
        skip_bad_rows=skip_bad_rows,
        val_inference_type=val_inference_type,
        bpe_dir=bpe_dir,
        ans2label_file=ans2label_file,
        device=device,
    )
    _say(out, written)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Checkpoint, ours or OFA's, or NAME.safetensors.")],
    out: Annotated[Path, typer.Argument(help="File to write; NAME.safetensors to export.")],
    arch: Annotated[str | None, typer.Option(help="ofa_SIZE or narvl_SIZE, if not the source's.")] = None,
    num_queries: Annotated[int | None, typer.Option(min=1, help="Queries of the student.")] = None,
    member: Annotated[str | None, typer.Option(help="Of a student of several tasks: the one to keep.")] = None,
    to: Annotated[str, typer.Option(help="Layout: narvl, or ofa for a teacher as OFA writes it.")] = "narvl",
    ema: Annotated[bool, typer.Option("--ema", help="Take the averaged weights.")] = False,
    allow_mismatch: Annotated[
        str, typer.Option(help="Tensors, or patterns joined by commas, that may be missing, unused or reshaped.")
    ] = "",
) -> None:
    """Turn a checkpoint into another: a teacher into a student, OFA's layout, safetensors."""
    from narvl_plugin.convert import convert

    if to not in ("narvl", "ofa"):
        raise InputError(f"--to {to}: choose narvl or ofa")
    notes = convert(
        source,
        out,
        arch=arch,
        num_queries=num_queries,
        member=member,
        to_ofa=to == "ofa",
        ema=ema,
        allow=[name for name in allow_mismatch.split(",") if name],
    )
    print("\n".join([*notes, str(out)]))


@app.command()
def predictions(
    generated: Annotated[Path, typer.Argument(help="generate-test.txt of fairseq-generate.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write.")],
    task: Benchmark,
    data: Annotated[Path, typer.Option(help="TSV file that was generated from.")],
    num_bins: Annotated[int, typer.Option(min=2, help="That of the training, for boxes; so are the next two.")] = 1000,
    max_image_size: Annotated[int, typer.Option(min=1, help="Side that the <bin_k> cover, in pixels.")] = 512,
    patch_image_size: Annotated[int, typer.Option(min=1, help="Side of the square picture, in pixels.")] = 512,
) -> None:
    """Turn what a model said into the file of predictions that a benchmark takes."""
    from narvl_plugin.evaluation.predictions import BinSizes, write_predictions

    bins = BinSizes(num_bins, max_image_size, patch_image_size)
    print(f"{out}: {write_predictions(generated, out, task=task, data=data, bins=bins)} predictions")


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="JSON file of predictions, see narvl predictions.")],
    annotations: Annotated[list[Path], typer.Argument(help="Official files; for refcoco refs(unc).p instances.json.")],
    task: Benchmark,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the scores to, too.")] = None,
) -> None:
    """Score predictions against a benchmark's official annotations, as its own evaluation does."""
    from narvl_plugin.evaluation import benchmarks, tables

    scores = benchmarks.evaluate(predictions, annotations, task)
    if out is not None:
        tables.write_scores(scores, out)
    tables.print_scores(scores)


@bench_app.command()
def latency(
    teacher: Annotated[Path, typer.Option(help="Checkpoint of the teacher.")],
    student: Annotated[Path, typer.Option(help="Checkpoint of the student.")],
    data: Annotated[Path, typer.Option(help="TSV file with pictures.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    images: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 100,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads while it is timed.")] = 1,
    max_len_b: MaxLenB = None,
    no_repeat_ngram_size: NoRepeat = None,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time teacher (beam 5 and greedy; all answers scored and beam 5) and student, one picture at a time, in turns."""
    from narvl_plugin import bench

    given = {"max_len_b": max_len_b, "no_repeat_ngram_size": no_repeat_ngram_size}
    result = bench.latency(
        out,
        teacher=teacher,
        student=student,
        data=data,
        generation={name: value for name, value in given.items() if value is not None},
        task_overrides=_overrides(bpe_dir, ans2label_file),
        images=images,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    for name, times in result["systems"].items():
        print(f"{name}: p50 {times['p50_ms']:.1f} ms, p95 {times['p95_ms']:.1f} ms, n {times['n']}")


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a run, with generate/*/generate-test.txt.")],
    data: Annotated[Path | None, typer.Option(help="Test TSV, if not OUT/data/TASK/test.tsv.")] = None,
    task: Annotated[str, typer.Option(help="caption, vqa_gen, refcoco or snli_ve.")] = "caption",
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
) -> None:
    """Score a run and write results.json, table.md and report.html into its folder."""
    from narvl_plugin.report import build_report

    build_report(
        out, task=task, test_tsv=data, settings=_run_settings(out), task_overrides=_overrides(bpe_dir, ans2label_file)
    )


def _overrides(bpe_dir: Path | None, ans2label_file: Path | None) -> dict[str, str]:
    """Return the options of the task that differ from the checkpoint's."""
    given = {"bpe_dir": bpe_dir, "ans2label_file": ans2label_file}
    return {name: str(value) for name, value in given.items() if value is not None}


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


def _run_settings(out: Path) -> dict[str, str]:
    """Read the settings that a run script kept; none, if it kept none."""
    file = out / SETTINGS_FILE
    if not file.exists():
        return {}
    return dict(line.split("=", 1) for line in file.read_text(encoding="utf-8").splitlines() if "=" in line)


def _say(out: Path, written: bool) -> None:
    """Say where the result is."""
    print(out if written else f"{out} is there already; delete it to make it anew")


def run() -> None:
    """Run the command line; what a user can mend ends in one line and code 1 (NARVL_DEBUG=1: all of it)."""
    try:
        app(prog_name="narvl")
    except (InputError, OSError, ValueError) as error:
        if os.environ.get("NARVL_DEBUG") == "1":
            raise
        print(f"narvl: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
