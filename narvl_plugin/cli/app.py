"""The commands of the program `narvl`; each imports what it runs when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import narvl_plugin
from narvl_plugin.cli import bench, data
from narvl_plugin.cli.options import Ans2LabelFile, BpeDir, MaxLenB, NoRepeat, overrides
from narvl_plugin.errors import InputError, check_arguments, harmless

SETTINGS_FILE = "settings.txt"
"""Where a run script keeps its settings in the run's folder, as lines KEY=value."""

app = typer.Typer(
    help="Parallel vision-language models with Query-CTC: data, distillation, latency and report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data", help="Make data sets.")
app.add_typer(bench.app, name="bench", help="Measure what models cost.")

Benchmark = Annotated[str, typer.Option("--task", help="caption, vqa, gqa, refcoco or snli_ve.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
Device = Annotated[str | None, typer.Option(help="torch's name of it; by default a GPU if there is one.")]
SkipBadRows = Annotated[int, typer.Option(min=0, help="How many rows that cannot be used are left out.")]


@app.command()
def path() -> None:
    """Print the folder of the plugin: fairseq-train --user-dir "$(narvl path)" ..."""
    print(Path(narvl_plugin.__file__).parent)


@app.command()
def vocab(
    data: Annotated[
        Path,
        typer.Argument(help="TSV file to train on, or the YAML file of a mixture: the training files of its members."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for spm.model, to be used as --bpe-dir.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Most pieces to learn.")] = 1000,
    column: Annotated[
        str | None,
        typer.Option(
            help="Numbers (from 0) of the columns with what models read and say: 2 (if none is given) of captions and "
            "regions, 2,3 of questions, 3,4,5 of entailment. Of a mixture the tasks of its members say it."
        ),
    ] = None,
) -> None:
    """Train a small sentencepiece vocabulary on the text of a TSV file, or of all members of a mixture."""
    from narvl_plugin.data.text import train_vocabulary
    from narvl_plugin.tasks.members import texts_of_members

    mixture = data.suffix in (".yaml", ".yml")
    if mixture and column is not None:
        raise InputError(f"--column {column}: is for a TSV file; the tasks of {data} say which columns hold texts")
    files = texts_of_members(str(data)) if mixture else [(str(data), "2" if column is None else column)]
    print(train_vocabulary(files, out, vocab_size))


@app.command()
def features(
    data: Annotated[Path, typer.Argument(help="TSV file with pictures.")],
    out: Annotated[Path, typer.Argument(help="TSV file to write.")],
    arch: Annotated[str, typer.Option(help="Architecture whose trunk is frozen.")] = "narvl_nano",
    patch_image_size: Annotated[int, typer.Option(min=16, help="Side of the square picture, in pixels.")] = 128,
    imagenet_default_mean_and_std: Annotated[
        bool, typer.Option(help="Normalise by ImageNet's mean and deviation, if training does.")
    ] = False,
    image_column: Annotated[
        int, typer.Option(min=0, help="Number (from 0) of the picture's column: 5 of questions, 2 of entailment.")
    ] = 4,
    batch_size: BatchSize = 16,
    skip_bad_rows: SkipBadRows = 0,
    device: Device = None,
) -> None:
    """Compute a frozen vision trunk's features once for each picture, for quick training."""
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
    member: Annotated[str | None, typer.Option(help="Of a teacher of several tasks: whose outputs to write.")] = None,
    device: Device = None,
) -> None:
    """Put a teacher's outputs in place of a TSV file's targets; stopped and started again, it goes on."""
    from narvl_plugin.inference.distillation import distill

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
        member=member,
        device=device,
    )
    _say(out, written)


@app.command()
def caption(
    pictures: Annotated[list[Path], typer.Argument(help="Folders, searched to the bottom, and picture files.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of a teacher or a student of captions.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write, of lines or, as NAME.json, of COCO's results format.")
    ] = None,
    batch_size: BatchSize = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures while the model runs.")] = 1,
    beam: Annotated[int | None, typer.Option(min=1, help="Width of the beam, if not that of --eval-args.")] = None,
    skip_bad_rows: Annotated[int, typer.Option(min=0, help="How many unreadable pictures are left out.")] = 0,
    bpe_dir: BpeDir = None,
    device: Device = None,
) -> None:
    """Say what is in picture files: lines of a path and a caption, in the order of the paths."""
    from narvl_plugin.inference.captioning import caption_pictures

    count = caption_pictures(
        pictures,
        checkpoint=checkpoint,
        out=out,
        batch_size=batch_size,
        workers=workers,
        beam=beam,
        skip_bad_rows=skip_bad_rows,
        bpe_dir=bpe_dir,
        device=device,
    )
    speed = (count.captions + count.skipped) / count.seconds
    left_out = count.skipped + count.unread
    print(f"{count.captions} captions, {left_out} left out, {speed:.1f} images/s", file=sys.stderr)


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
    from narvl_plugin.checkpoints.conversion import convert

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
def export(
    student: Annotated[Path, typer.Argument(help="Checkpoint of a student.")],
    out: Annotated[Path, typer.Argument(help="Folder to write: the model, run.py, what it needs.")],
    to: Annotated[str, typer.Option(help="onnx, openvino or torch-export.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="8 bits for the weights of matrix products; of onnx.")] = False,
    prompt_length: Annotated[
        int, typer.Option(min=3, help="Most tokens of a prompt, where the task reads a text.")
    ] = 32,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
) -> None:
    """Write a student as one graph that runs without narvl: python OUT/run.py PICTURE [question=TEXT]."""
    from narvl_plugin.export import export

    difference = export(
        student,
        out,
        to=to,
        int8=int8,
        prompt_length=prompt_length,
        task_overrides=overrides(bpe_dir, ans2label_file),
    )
    print(f"{out}: probabilities within {difference:.1e} of the checkpoint's")


@app.command()
def calibrate(
    student: Annotated[Path, typer.Argument(help="Checkpoint of a student, which keeps what is fitted.")],
    data: Annotated[Path, typer.Argument(help="TSV file to fit on, such as that of validation.")],
    test: Annotated[Path | None, typer.Option(help="TSV file to measure on, before and after.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint of a teacher to measure, too.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write what was measured to.")] = None,
    beam: Annotated[
        int | None, typer.Option(min=1, help="Width of the beam, if not that of --eval-args, or 5.")
    ] = None,
    max_len_b: MaxLenB = None,
    no_repeat_ngram_size: NoRepeat = None,
    batch_size: BatchSize = 32,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    device: Device = None,
) -> None:
    """Fit a student's temperature and odds, so that it is right as often as it is sure; its checkpoint keeps it."""
    from narvl_plugin.inference.calibration import calibrate

    given = {"beam": beam, "max_len_b": max_len_b, "no_repeat_ngram_size": no_repeat_ngram_size}
    result = calibrate(
        student,
        data,
        test=test,
        teacher=teacher,
        out=out,
        generation={name: value for name, value in given.items() if value is not None},
        task_overrides=overrides(bpe_dir, ans2label_file),
        batch_size=batch_size,
        device=device,
    )
    print(
        f"temperature {result['temperature']:.2f}, log-odds times {result['slope']:.2f} {result['offset']:+.2f}, "
        f"fitted on {result['fitted_on']:,} rows, kept in {student}"
    )
    for name, measured in result["systems"].items():
        print(
            f"{name}: right {measured['mean_right']:.3f}, confidence {measured['mean_confidence']:.3f}, expected "
            f"calibration error {measured['error']:.3f}, area below risk and coverage {measured['area']:.3f}"
        )


@app.command()
def predictions(
    generated: Annotated[Path, typer.Argument(help="generate-test.txt of fairseq-generate.")],
    out: Annotated[Path, typer.Argument(help="JSON file to write.")],
    task: Benchmark,
    data: Annotated[Path, typer.Option(help="TSV file that was generated from.")],
    num_bins: Annotated[
        int | None, typer.Option(min=2, help="For boxes, if the generated file does not say it; so are the next two.")
    ] = None,
    max_image_size: Annotated[int | None, typer.Option(min=1, help="Side that the <bin_k> cover, in pixels.")] = None,
    patch_image_size: Annotated[int | None, typer.Option(min=1, help="Side of the square image, in pixels.")] = None,
) -> None:
    """Turn what a model said into the file of predictions that a benchmark takes."""
    from narvl_plugin.evaluation.predictions import BinSizes, write_predictions

    given = {"num_bins": num_bins, "max_image_size": max_image_size, "patch_image_size": patch_image_size}
    bins = BinSizes.of(generated, given) if task == "refcoco" else BinSizes()
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
    from narvl_plugin.whole_files import require_writable

    if out is not None:
        require_writable(out)
    scores = benchmarks.evaluate(predictions, annotations, task)
    if out is not None:
        tables.write_scores(scores, out)
    tables.print_scores(scores)


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
        out, task=task, test_tsv=data, settings=_run_settings(out), task_overrides=overrides(bpe_dir, ans2label_file)
    )


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
        check_arguments(sys.argv[1:])
        app(prog_name="narvl")
    except (InputError, OSError, ValueError) as error:
        if os.environ.get("NARVL_DEBUG") == "1":
            raise
        print(f"narvl: {harmless(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(1)
