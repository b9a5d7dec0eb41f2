"""The commands of the program `narvl`. Each imports what it needs only when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import narvl_plugin
from narvl_plugin.cli import bench, data, demo, study
from narvl_plugin.cli.options import (
    AbstainBelow,
    Actors,
    Address,
    Ans2LabelFile,
    AnyModel,
    BatchSize,
    Beam,
    Benchmark,
    BpeDir,
    Device,
    Engine,
    GpusPerActor,
    ImageFiles,
    ImagesAndText,
    ImageWorkers,
    JsonLines,
    MaxLenB,
    NBest,
    NgramAutomaton,
    NgramWeight,
    NoRepeat,
    Predictions,
    SearchBeam,
    ShowPage,
    SkipBadRows,
    SkipImages,
    Task,
    overrides,
    with_ngrams,
)
from narvl_plugin.cli.run import SETTINGS
from narvl_plugin.cli.run import run as run_recipe
from narvl_plugin.cli.serve import serve
from narvl_plugin.errors import InputError, check_arguments, harmless

SETTINGS_FILE = "settings.txt"
"""Name of the file in a run's folder in which a run script keeps its settings, as lines KEY=value."""

app = typer.Typer(
    help="Parallel vision-language models with Query-CTC: data, distillation, latency and report.",
    rich_markup_mode=None,  # rich takes words in brackets for its markup and does not print them
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data", help="Make data sets.")
app.add_typer(bench.app, name="bench", help="Measure the cost of models.")
app.add_typer(study.app, name="study", help="Run many settings, and compare them.")


@app.command()
def path() -> None:
    """Print the plugin's folder, which fairseq takes as --user-dir.

    Example: fairseq-train --user-dir "$(narvl path)" ...
    """
    print(Path(narvl_plugin.__file__).parent)


@app.command()
def vocab(
    data: Annotated[
        Path,
        typer.Argument(help="TSV file, or YAML file of a mixture, whose members' training files are then read."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for spm.model, to use as --bpe-dir.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Largest number of pieces to learn.")] = 1000,
    column: Annotated[
        str | None,
        typer.Option(
            help="Numbers (from 0) of the columns with the models' input and output texts. The default is 2, for "
            "captions, regions, triplets and trees. Give 2,3 for questions and 3,4,5 for entailment. A mixture sets "
            "the columns itself."
        ),
    ] = None,
) -> None:
    """Train a small sentencepiece vocabulary.

    The text is that of a TSV file, or of all members of a mixture.
    """
    from narvl_plugin.data.text import train_vocabulary
    from narvl_plugin.tasks.members import texts_of_members

    mixture = data.suffix in (".yaml", ".yml")
    if mixture and column is not None:
        raise InputError(
            f"--column {column}: is for a TSV file; leave it out, since the tasks of {data} set the columns"
        )
    files = texts_of_members(str(data)) if mixture else [(str(data), "2" if column is None else column)]
    print(train_vocabulary(files, out, vocab_size))


@app.command()
def ngrams(
    data: Annotated[Path, typer.Argument(help="TSV file with captions, such as the training file.")],
    out: Annotated[Path, typer.Option(help="File to write, for --ngram-automaton.")],
    bpe_dir: Annotated[Path, typer.Option(help="Folder of the model's vocabulary.")],
    order: Annotated[int, typer.Option(min=2, max=8, help="Length of the longest n-grams, in tokens.")] = 4,
    hard: Annotated[
        int, typer.Option(min=2, max=8, help="Length of the n-grams that a caption may not invent, in tokens.")
    ] = 2,
    column: Annotated[int, typer.Option(min=0, help="Number (from 0) of the column with captions.")] = 2,
) -> None:
    """Count the n-grams of captions.

    With the result, a student's captions keep to the n-grams of the data: fairseq-generate --ngram-automaton OUT
    """
    from narvl_plugin.data.ngram_files import write_ngrams
    from narvl_plugin.data.text import load_codec

    automaton = write_ngrams(data, out, load_codec(bpe_dir), order=order, hard=hard, column=column)
    print(f"{out}: {len(automaton.arrays.shorter):,} contexts, {len(automaton.arrays.labels):,} n-grams")


@app.command()
def features(
    data: Annotated[Path, typer.Argument(help="TSV file with images.")],
    out: Annotated[Path, typer.Argument(help="TSV file to write.")],
    arch: Annotated[str, typer.Option(help="Architecture whose backbone is frozen.")] = "narvl_nano",
    patch_image_size: Annotated[int, typer.Option(min=16, help="Side of the square image, in pixels.")] = 128,
    imagenet_default_mean_and_std: Annotated[
        bool, typer.Option(help="Normalise by ImageNet's mean and deviation, if training does so.")
    ] = False,
    image_column: Annotated[
        int, typer.Option(min=0, help="Number (from 0) of the image's column: 5 of questions, 2 of entailment.")
    ] = 4,
    batch_size: BatchSize = 16,
    skip_bad_rows: SkipBadRows = 0,
    device: Device = None,
) -> None:
    """Compute a frozen vision backbone's features of each image.

    Training on features takes less time than training on images.
    """
    from narvl_plugin.inference.features import write_features

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
    teacher: Annotated[
        list[Path],
        typer.Option(
            help="Checkpoint of the teacher or of a student, or port of OFA. Give several times for an ensemble."
        ),
    ],
    data: Annotated[Path, typer.Option(help="TSV file with images or their features.")],
    out: Annotated[str, typer.Option(help="TSV file to write, with the same columns. NAME/ is a folder of shards.")],
    beam: Beam = 5,
    nbest: Annotated[int, typer.Option(min=1, help="Number of captions to write per row, joined by &&.")] = 1,
    batch_size: BatchSize = 32,
    keep_references: Annotated[bool, typer.Option(help="Also write the original rows.")] = False,
    max_len_b: MaxLenB = None,
    no_repeat_ngram_size: NoRepeat = None,
    val_inference_type: Annotated[
        str | None, typer.Option(help="Search for answers: allcand or beamsearch, if not the checkpoint's.")
    ] = None,
    skip_bad_rows: SkipBadRows = 0,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    member: Annotated[str | None, typer.Option(help="Task to write, if the teacher has several.")] = None,
    mbr: Annotated[
        str | None,
        typer.Option(help="Of a student's beam, write the captions with the highest expected bleu or cider."),
    ] = None,
    device: Device = None,
    engine: Engine = "local",
    address: Address = None,
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
) -> None:
    """Replace the targets of a TSV file by a teacher's outputs.

    If the command is interrupted, the same command resumes where it stopped.
    """
    from narvl_plugin.inference.distillation import Distillation, distill

    where = Where(engine, address, actors, gpus_per_actor)
    options: dict[str, Any] = {
        "data": data,
        "beam": beam,
        "nbest": nbest,
        "batch_size": batch_size,
        "keep_references": keep_references,
        "max_len_b": max_len_b,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "val_inference_type": val_inference_type,
        "skip_bad_rows": skip_bad_rows,
        "bpe_dir": bpe_dir,
        "ans2label_file": ans2label_file,
        "member": member,
        "mbr": mbr,
        "device": device,
    }
    if not _is_folder(out):
        where.require_file()
        _say(Path(out), distill(teacher=teacher, out=Path(out), **options))
        return
    from narvl_plugin.bulk.commands import distill_shards
    from narvl_plugin.bulk.engines import Runner

    totals = distill_shards(Distillation(teachers=tuple(teacher), **options), Path(out), Runner(*where))
    print(f"{out}: {totals.rows} rows, {totals.skipped} left out, {totals.new / totals.seconds:.1f} rows/s")


@app.command()
def caption(
    images: ImageFiles,
    checkpoint: AnyModel = None,
    out: Predictions = None,
    json: JsonLines = False,
    show: ShowPage = None,
    batch_size: BatchSize = 8,
    workers: ImageWorkers = 1,
    beam: SearchBeam = None,
    nbest: NBest = None,
    abstain_below: AbstainBelow = 0.0,
    skip_bad_rows: SkipImages = 0,
    bpe_dir: BpeDir = None,
    device: Device = None,
    ngram_automaton: NgramAutomaton = None,
    ngram_weight: NgramWeight = 0.2,
    engine: Engine = "local",
    address: Address = None,
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
) -> None:
    """Caption image files.

    Each line of the output holds a path and a caption. Lines are in the order of the paths. If the command is
    interrupted, the same command resumes where it stopped.
    """
    options = Answering(
        checkpoint, out, json, show, batch_size, workers, beam, nbest, abstain_below, skip_bad_rows, bpe_dir, device
    )
    where = Where(engine, address, actors, gpus_per_actor)
    ngrams = {"ngram_automaton": ngram_automaton, "ngram_weight": ngram_weight}
    _predict("caption", "captions", images, None, options, where, **ngrams)


@app.command()
def answer(
    images: ImagesAndText,
    checkpoint: AnyModel = None,
    answers: Annotated[
        str | None, typer.Option(help="Closed list of answers, joined by commas, if not the model's own.")
    ] = None,
    out: Predictions = None,
    json: JsonLines = False,
    show: ShowPage = None,
    batch_size: BatchSize = 8,
    workers: ImageWorkers = 1,
    beam: SearchBeam = None,
    nbest: NBest = None,
    abstain_below: AbstainBelow = 0.0,
    skip_bad_rows: SkipImages = 0,
    bpe_dir: BpeDir = None,
    device: Device = None,
    engine: Engine = "local",
    address: Address = None,
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
) -> None:
    """Answer a question about image files.

    Each line of the output holds a path, an answer and its confidence. If the command is interrupted, the same command
    resumes where it stopped.

    Example: narvl answer photos/ "what color is the car?"
    """
    options = Answering(
        checkpoint, out, json, show, batch_size, workers, beam, nbest, abstain_below, skip_bad_rows, bpe_dir, device
    )
    where = Where(engine, address, actors, gpus_per_actor)
    listed = None if answers is None else [one.strip() for one in answers.split(",")]
    _predict("answer", "answers", *_images_and_text(images, "question", out), options, where, answers=listed)


@app.command()
def locate(
    images: ImagesAndText,
    checkpoint: AnyModel = None,
    all: Annotated[
        bool, typer.Option("--all", help="Find all regions that the words describe, by a model of the task regions.")
    ] = False,
    out: Predictions = None,
    json: JsonLines = False,
    show: ShowPage = None,
    batch_size: BatchSize = 8,
    workers: ImageWorkers = 1,
    beam: SearchBeam = None,
    nbest: NBest = None,
    abstain_below: AbstainBelow = 0.0,
    skip_bad_rows: SkipImages = 0,
    bpe_dir: BpeDir = None,
    device: Device = None,
    engine: Engine = "local",
    address: Address = None,
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
) -> None:
    """Find the region of image files that words describe.

    Each line of the output holds a path, the box as x0,y0,x1,y1 in pixels of the upright image, and its confidence.
    With --all, && joins the boxes, the most probable first, and there may be none. If the command is interrupted, the
    same command resumes where it stopped.

    Example: narvl locate scene.png "the red car" --show found.html
    """
    options = Answering(
        checkpoint, out, json, show, batch_size, workers, beam, nbest, abstain_below, skip_bad_rows, bpe_dir, device
    )
    verb, things = ("regions", "sets of boxes") if all else ("locate", "boxes")
    where = Where(engine, address, actors, gpus_per_actor)
    _predict(verb, things, *_images_and_text(images, "words", out), options, where)


@app.command()
def graph(
    images: ImageFiles,
    checkpoint: AnyModel = None,
    out: Predictions = None,
    json: JsonLines = False,
    show: ShowPage = None,
    batch_size: BatchSize = 8,
    workers: ImageWorkers = 1,
    beam: SearchBeam = None,
    nbest: NBest = None,
    abstain_below: AbstainBelow = 0.0,
    skip_bad_rows: SkipImages = 0,
    bpe_dir: BpeDir = None,
    device: Device = None,
    engine: Engine = "local",
    address: Address = None,
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
) -> None:
    """Find the relations of the objects in image files.

    Each line of the output holds a path, the triplets and the confidence that they are all. && joins triplets, the most
    probable first. A triplet is NOUN x0,y0,x1,y1 | RELATION | NOUN x0,y0,x1,y1, in pixels of the upright image. If the
    command is interrupted, the same command resumes where it stopped.

    The model must have the task scene_graph, which the model in the box has not.

    Example: narvl graph scene.png --checkpoint student.pt --show graph.html
    """
    options = Answering(
        checkpoint, out, json, show, batch_size, workers, beam, nbest, abstain_below, skip_bad_rows, bpe_dir, device
    )
    where = Where(engine, address, actors, gpus_per_actor)
    _predict("graph", "graphs", images, None, options, where)


@app.command()
def entail(
    images: ImagesAndText,
    checkpoint: AnyModel = None,
    out: Predictions = None,
    json: JsonLines = False,
    show: ShowPage = None,
    batch_size: BatchSize = 8,
    workers: ImageWorkers = 1,
    beam: SearchBeam = None,
    nbest: NBest = None,
    abstain_below: AbstainBelow = 0.0,
    skip_bad_rows: SkipImages = 0,
    bpe_dir: BpeDir = None,
    device: Device = None,
    engine: Engine = "local",
    address: Address = None,
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
) -> None:
    """Tell whether image files show what a statement says.

    Each line of the output holds a path, yes, no or maybe, and the confidence. If the command is interrupted, the same
    command resumes where it stopped.

    Example: narvl entail scene.png "two dogs are running"
    """
    options = Answering(
        checkpoint, out, json, show, batch_size, workers, beam, nbest, abstain_below, skip_bad_rows, bpe_dir, device
    )
    where = Where(engine, address, actors, gpus_per_actor)
    _predict("entails", "answers", *_images_and_text(images, "statement", out), options, where)


@app.command()
def tree(
    images: ImageFiles,
    checkpoint: AnyModel = None,
    out: Predictions = None,
    json: JsonLines = False,
    show: ShowPage = None,
    batch_size: BatchSize = 8,
    workers: ImageWorkers = 1,
    beam: SearchBeam = None,
    nbest: NBest = None,
    abstain_below: AbstainBelow = 0.0,
    skip_bad_rows: SkipImages = 0,
    bpe_dir: BpeDir = None,
    device: Device = None,
    engine: Engine = "local",
    address: Address = None,
    actors: Actors = None,
    gpus_per_actor: GpusPerActor = None,
) -> None:
    """Find the regions and objects of image files, as trees.

    Each line of the output holds a path, a tree in brackets, and its confidence. With --json, each region and object
    also has a probability. If the command is interrupted, the same command resumes where it stopped.

    The model must have the task scene_tree, which the model in the box has not.

    Example: narvl tree scene.png --checkpoint student.pt --json
    """
    options = Answering(
        checkpoint, out, json, show, batch_size, workers, beam, nbest, abstain_below, skip_bad_rows, bpe_dir, device
    )
    where = Where(engine, address, actors, gpus_per_actor)
    _predict("tree", "trees", images, None, options, where)


class Answering(NamedTuple):
    """The options that caption, answer, locate, graph, entail and tree share."""

    checkpoint: Path | None
    out: str | None
    json: bool
    show: Path | None
    batch_size: int
    workers: int
    beam: int | None
    nbest: int | None
    abstain_below: float
    skip_bad_rows: int
    bpe_dir: Path | None
    device: str | None


class Where(NamedTuple):
    """The options of where a folder of shards is filled; see `Runner`."""

    engine: str
    address: str | None
    actors: int | None
    gpus_per_actor: float | None

    def require_file(self) -> None:
        """Raise InputError if an option is given that only a folder of shards has."""
        if self != Where("local", None, None, None):
            raise InputError("--engine, --address, --actors and --gpus-per-actor: need a folder of shards, --out NAME/")


def _is_folder(out: str | None) -> bool:
    """Tell whether an output is a folder of shards: its name ends in a slash."""
    return out is not None and out.endswith("/")


def _images_and_text(words: list[str], what: str, out: str | None) -> tuple[list[str], str | None]:
    """Return the images and the text of a command line: the last word is the text.

    For a folder of shards the last word may be an input, too. Each row then has its own text.
    """
    *images, text = words
    if _is_folder(out):
        from narvl_plugin.bulk.shards import is_input

        if is_input(text):
            return words, None
    if not images:
        raise InputError(f"the {what} is missing; give image files and folders, and the {what} last, in quotes")
    if Path(text).is_file():
        raise InputError(f"the last argument, {text}, is a file; the {what} must come last, in quotes")
    return images, text


def _predict(
    verb: str, things: str, images: list[str], text: str | None, options: Answering, where: Where, **others: Any
) -> None:
    """Write predictions for image files, and print how many."""
    if not _is_folder(options.out):
        where.require_file()
    if options.checkpoint is None:
        print(
            "no --checkpoint: the model in the box answers. It knows scenes of emoji art; photos are beyond it",
            file=sys.stderr,
        )
    if _is_folder(options.out):
        _predict_shards(verb, things, images, text, options, where, **others)
        return
    from narvl_plugin.api.files import predict_files
    from narvl_plugin.program import end_workers_briefly

    end_workers_briefly()
    given = options._asdict()
    given["out"] = None if options.out is None else Path(options.out)
    count = predict_files(
        list(map(Path, images)), verb=verb, text=text, as_json_lines=given.pop("json"), **given, **others
    )
    speed = (count.captions + count.skipped) / count.seconds
    left_out = count.skipped + count.unread
    print(f"{count.captions} {things}, {left_out} left out, {speed:.1f} images/s", file=sys.stderr)


def _predict_shards(
    verb: str, things: str, images: list[str], text: str | None, options: Answering, where: Where, **others: Any
) -> None:
    """Write predictions into a folder of shards, and print how many."""
    from narvl_plugin.api import Decoding
    from narvl_plugin.bulk.answers import Predicting
    from narvl_plugin.bulk.commands import format_of_folder, predict_shards
    from narvl_plugin.bulk.engines import Runner

    assert options.out is not None
    if options.show is not None:
        raise InputError("--show: is for one file of predictions, and not for a folder of shards")
    suffix = format_of_folder(options.out)
    totals, planned = predict_shards(
        images,
        Path(options.out),
        Predicting(
            verb=verb,
            text=text,
            suffix=".jsonl" if options.json and suffix == ".tsv" else suffix,
            checkpoint=options.checkpoint,
            bpe_dir=options.bpe_dir,
            device=options.device,
            batch_size=options.batch_size,
            workers=options.workers,
            skip_bad_rows=options.skip_bad_rows,
            decoding=Decoding(options.beam, options.nbest, abstain_below=options.abstain_below, **others),
        ),
        Runner(*where),
    )
    left_out = totals.skipped + len(planned.left_out)
    speed = totals.new / totals.seconds
    print(f"{totals.rows} {things}, {left_out} left out, {speed:.1f} images/s", file=sys.stderr)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint of narvl or of OFA, NAME.safetensors, folder of a Hugging Face or ModelScope port of OFA, "
            "or hf://OWNER/NAME."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="Checkpoint to write, or NAME.safetensors; with --to huggingface, a new folder.")
    ],
    arch: Annotated[str | None, typer.Option(help="Architecture, ofa_SIZE or narvl_SIZE, if not the source's.")] = None,
    num_queries: Annotated[int | None, typer.Option(min=1, help="Number of the student's queries.")] = None,
    member: Annotated[str | None, typer.Option(help="Task to keep, if the student has several.")] = None,
    to: Annotated[
        str,
        typer.Option(help="Layout to write: narvl; for a teacher also ofa, or huggingface, the layout of OFA's ports."),
    ] = "narvl",
    ema: Annotated[bool, typer.Option("--ema", help="Write the averaged weights.")] = False,
    slim: Annotated[
        bool,
        typer.Option("--slim", help="Write 16 bits and no frozen backbone of ImageNet, for use only."),
    ] = False,
    allow_mismatch: Annotated[
        str,
        typer.Option(help="Names or patterns of tensors that may be missing, unused or reshaped, joined by commas."),
    ] = "",
    bpe_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the vocabulary that --to huggingface writes, if not the checkpoint's."),
    ] = None,
) -> None:
    """Convert a checkpoint.

    The result may be a student made of a teacher, a teacher in the layout of OFA or of its ports, or a file of
    safetensors.
    """
    from narvl_plugin.checkpoints.conversion import convert

    notes = convert(
        source,
        out,
        arch=arch,
        num_queries=num_queries,
        member=member,
        to=to,
        ema=ema,
        slim=slim,
        allow=[name for name in allow_mismatch.split(",") if name],
        bpe_dir=bpe_dir,
    )
    print("\n".join([*notes, str(out)]))


@app.command()
def export(
    student: Annotated[Path, typer.Argument(help="Checkpoint of a student.")],
    out: Annotated[
        Path | None,
        typer.Argument(
            help="Folder for the model, run.py and the files that run.py needs. Without it, STUDENT with the suffix "
            ".onnx: from then on, the student runs as this graph on a CPU."
        ),
    ] = None,
    to: Annotated[str, typer.Option(help="Format: onnx, openvino or torch-export.")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Keep the weights of matrix products in 8 bits, for onnx only.")
    ] = False,
    prompt_length: Annotated[
        int, typer.Option(min=3, help="Largest number of tokens in a prompt, for tasks that read text.")
    ] = 32,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
) -> None:
    """Export a student as one graph that runs without narvl.

    Run it by: python OUT/run.py IMAGE [question=TEXT]
    """
    from narvl_plugin.export import export
    from narvl_plugin.models.exported import folder_beside

    if out is None and (to != "onnx" or int8):
        raise InputError("OUT: is missing; only --to onnx without --int8 has a place beside the checkpoint")
    folder = folder_beside(student) if out is None else out
    difference = export(
        student,
        folder,
        to=to,
        int8=int8,
        prompt_length=prompt_length,
        task_overrides=overrides(bpe_dir, ans2label_file),
    )
    print(f"{folder}: probabilities within {difference:.1e} of the checkpoint's")


@app.command()
def calibrate(
    student: Annotated[Path, typer.Argument(help="Checkpoint of a student. The fitted values are stored in it.")],
    data: Annotated[Path, typer.Argument(help="TSV file to fit on, such as the validation file.")],
    test: Annotated[Path | None, typer.Option(help="TSV file to measure on, before and after fitting.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint of a teacher, to measure it too.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write with the measurements.")] = None,
    beam: Annotated[
        int | None, typer.Option(min=1, help="Width of the beam search, if not as in --eval-args, or else 5.")
    ] = None,
    max_len_b: MaxLenB = None,
    no_repeat_ngram_size: NoRepeat = None,
    batch_size: BatchSize = 32,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    member: Annotated[str | None, typer.Option(help="Task to fit, if the student has several.")] = None,
    device: Device = None,
) -> None:
    """Fit a student's confidence to how often it is correct.

    The student's checkpoint stores the fitted temperature, slope and offset.
    """
    from narvl_plugin.inference.calibration import calibrate

    given = {"beam": beam, "max_len_b": max_len_b, "no_repeat_ngram_size": no_repeat_ngram_size}
    result = calibrate(
        student,
        data,
        test=test,
        teacher=teacher,
        out=out,
        generation={name: value for name, value in given.items() if value is not None},
        task_overrides=overrides(bpe_dir, ans2label_file, member),
        batch_size=batch_size,
        device=device,
    )
    print(
        f"temperature {result['temperature']:.2f}, log-odds times {result['slope']:.2f} {result['offset']:+.2f}, "
        f"fitted on {result['fitted_on']:,} rows, stored in {student}"
    )
    for name, measured in result["systems"].items():
        print(
            f"{name}: correct {measured['mean_right']:.3f}, confidence {measured['mean_confidence']:.3f}, expected "
            f"calibration error {measured['error']:.3f}, area below risk and coverage {measured['area']:.3f}"
        )


@app.command()
def predictions(
    generated: Annotated[Path, typer.Argument(help="File generate-test.txt of fairseq-generate.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write.")],
    task: Benchmark,
    data: Annotated[Path, typer.Option(help="TSV file that fairseq-generate read.")],
    num_bins: Annotated[
        int | None, typer.Option(min=2, help="Number of bins of boxes, if the generated file lacks it.")
    ] = None,
    max_image_size: Annotated[
        int | None, typer.Option(min=1, help="Side that the bins cover, in pixels, if the generated file lacks it.")
    ] = None,
    patch_image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the square image, in pixels, if the generated file lacks it.")
    ] = None,
) -> None:
    """Write a model's outputs in the format of a benchmark."""
    from narvl_plugin.evaluation.predictions import OF_BINS, BinSizes, write_predictions

    given = {"num_bins": num_bins, "max_image_size": max_image_size, "patch_image_size": patch_image_size}
    bins = BinSizes.of(generated, given) if task in OF_BINS else BinSizes()
    print(f"{out}: {write_predictions(generated, out, task=task, data=data, bins=bins)} predictions")


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="JSON file of predictions, as narvl predictions writes it.")],
    annotations: Annotated[list[Path], typer.Argument(help="Official files. For refcoco: refs(unc).p instances.json.")],
    task: Benchmark,
    out: Annotated[Path | None, typer.Option(help="JSON file to write with the scores.")] = None,
) -> None:
    """Score predictions by the official rules of a benchmark.

    The scores are those of the benchmark's own evaluation against its official annotations.
    """
    from narvl_plugin.evaluation import benchmarks, tables
    from narvl_plugin.whole_files import require_writable

    if out is not None:
        require_writable(out)
    scores = benchmarks.evaluate(predictions, annotations, task)
    if out is not None:
        tables.write_scores(scores, out)
    tables.print_scores(scores)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a run with generate/*/generate-test.txt.")],
    data: Annotated[Path | None, typer.Option(help="Test file, if not OUT/data/TASK/test.tsv.")] = None,
    task: Task = "caption",
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    ngram_automaton: NgramAutomaton = None,
) -> None:
    """Score a run and report on it.

    The run's folder receives results.json, table.md and report.html.
    """
    from narvl_plugin.report import build_report

    build_report(
        out,
        task=task,
        test_tsv=data,
        settings=_run_settings(out),
        task_overrides=overrides(bpe_dir, ans2label_file),
        student_options=with_ngrams(ngram_automaton),
    )


app.command()(demo.demo)


def _run_settings(out: Path) -> dict[str, str]:
    """Return the settings that a run script kept, or none if it kept none."""
    file = out / SETTINGS_FILE
    if not file.exists():
        return {}
    return dict(line.split("=", 1) for line in file.read_text(encoding="utf-8").splitlines() if "=" in line)


app.command()(serve)
app.command("run", epilog=SETTINGS, context_settings={"ignore_unknown_options": True})(run_recipe)


def _say(out: Path, written: bool) -> None:
    """Print where the result is."""
    print(out if written else f"{out} is there already; delete it to make it anew")


def run() -> None:
    """Run the command line.

    An error that a user can fix ends the program with one line and code 1. With NARVL_DEBUG=1 it is raised.
    """
    try:
        check_arguments(sys.argv[1:])
        app(prog_name="narvl")
    except (InputError, OSError, ValueError) as error:
        if os.environ.get("NARVL_DEBUG") == "1":
            raise
        print(f"narvl: {harmless(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
