"""The commands of the program `narvl`; each imports what it runs when it runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import narvl_command
from narvl_plugin import data_commands
from narvl_plugin.errors import InputError

SETTINGS_FILE = "settings.txt"
"""Where a run script keeps its settings in the run's folder, as lines KEY=value."""

app = typer.Typer(
    help="Parallel vision-language models with Query-CTC: data, distillation, latency and report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(no_args_is_help=True)
app.add_typer(data_commands.app, name="data", help="Make data sets.")
app.add_typer(bench_app, name="bench", help="Measure what models cost.")

Benchmark = Annotated[str, typer.Option("--task", help="caption, vqa, gqa, refcoco or snli_ve.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows at a time.")]
BpeDir = Annotated[Path | None, typer.Option(help="Vocabulary's folder, if not the one the checkpoint names.")]
Ans2LabelFile = Annotated[Path | None, typer.Option(help="List of answers, if not where the checkpoint says.")]
Device = Annotated[str | None, typer.Option(help="torch's name of it; by default a GPU if there is one.")]
MaxLenB = Annotated[int | None, typer.Option(min=1, help="Longest output, in tokens, if not as in --eval-args.")]
NoRepeat = Annotated[
    int | None,
    typer.Option(min=0, help="Length of n-grams that are said once only; 0: any; if not as in --eval-args."),
]
SkipBadRows = Annotated[int, typer.Option(min=0, help="How many rows that cannot be used are left out.")]


@app.command()
def path() -> None:
    """Print the folder of the plugin: fairseq-train --user-dir "$(narvl path)" ..."""
    print(narvl_command.plugin_folder())


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
    from narvl_plugin.captioning import caption_pictures

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
    print(f"{count.captions} captions, {count.skipped} left out, {speed:.1f} images/s", file=sys.stderr)


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
        task_overrides=_overrides(bpe_dir, ans2label_file),
    )
    print(f"{out}: probabilities within {difference:.1e} of the checkpoint's")


@app.command()
def calibrate(
    student: Annotated[Path, typer.Argument(help="Checkpoint of a student, which keeps the temperature.")],
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
    """Fit a student's temperature, so that it is right as often as it is sure; its checkpoint keeps it."""
    from narvl_plugin.calibration import calibrate

    given = {"beam": beam, "max_len_b": max_len_b, "no_repeat_ngram_size": no_repeat_ngram_size}
    result = calibrate(
        student,
        data,
        test=test,
        teacher=teacher,
        out=out,
        generation={name: value for name, value in given.items() if value is not None},
        task_overrides=_overrides(bpe_dir, ans2label_file),
        batch_size=batch_size,
        device=device,
    )
    print(f"temperature {result['temperature']:.2f}, fitted on {result['fitted_on']:,} rows, kept in {student}")
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
    for name, times in result["stages"].items():
        print(f"{name}, ms: " + ", ".join(f"{stage} {milliseconds:.1f}" for stage, milliseconds in times.items()))


@bench_app.command()
def models(
    teacher: Annotated[Path, typer.Option(help="Checkpoint of the teacher.")],
    student: Annotated[Path, typer.Option(help="Checkpoint of the student.")],
    data: Annotated[Path, typer.Option(help="TSV file with pictures.")],
    out: Annotated[Path, typer.Option(help="JSON file to write; a plot goes beside it.")],
    exported: Annotated[
        list[Path] | None, typer.Option(help="Folder of narvl export; more than one may be given.")
    ] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also by torch.compile, which takes minutes.")] = False,
    images: Annotated[int, typer.Option(min=1, help="How many pictures.")] = 100,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each system.")] = 1,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Compare teacher, student and exported students, asked in all ways: quality, latency, images/s, stages."""
    from narvl_plugin import bench_models

    result = bench_models.compare(
        out,
        teacher=teacher,
        student=student,
        data=data,
        exported=exported or [],
        compiled=compiled,
        task_overrides=_overrides(bpe_dir, ans2label_file),
        images=images,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    print(bench_models.table(result))


@bench_app.command()
def decoding(
    student: Annotated[Path, typer.Option(help="Checkpoint of the student.")],
    data: Annotated[Path, typer.Option(help="TSV file with pictures.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint of a teacher to rescore with.")] = None,
    frequencies: Annotated[Path | None, typer.Option(help="TSV file of captions to count n-grams in.")] = None,
    images: Annotated[int, typer.Option(min=1, help="How many pictures are timed.")] = 50,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Decode a student in all ways there are: quality, outputs that are none, calibration error, latency."""
    from narvl_plugin import bench_decoding

    result = bench_decoding.decoding(
        out,
        student=student,
        data=data,
        teacher=teacher,
        frequencies=frequencies,
        task_overrides=_overrides(bpe_dir, ans2label_file),
        images=images,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    print(bench_decoding.table(result))


@bench_app.command()
def search() -> None:
    """Time beam search (16 sentences, 20 queries, 59,458 labels) beside other packages, and lists of 3,129 answers."""
    from narvl_plugin import bench_decoding

    for name, milliseconds in bench_decoding.beam_search_speeds().items():
        print(f"beam 8, {name}: {milliseconds:.2f} ms a sentence")
    for name, milliseconds in bench_decoding.answer_list_speeds().items():
        print(f"3,129 answers, {name}: {milliseconds:.2f} ms a picture")


@bench_app.command()
def floor(
    size: Annotated[str, typer.Option(help="nano, tiny, medium, base, large or huge.")] = "base",
    side: Annotated[int, typer.Option(min=32, help="Side of the picture, in pixels.")] = 480,
    queries: Annotated[int, typer.Option(min=1, help="Queries of the student.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 2,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also by torch.compile, which takes minutes.")] = False,
    exported: Annotated[str, typer.Option(help="Also by graphs of narvl export, such as onnx,openvino.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time a student, one picture at a time, beside its FLOPs at the rate of a matrix product measured in turns."""
    from narvl_plugin.bench_floor import distance_to_floor

    found = distance_to_floor(
        size=size,
        side=side,
        queries=queries,
        repeats=repeats,
        threads=threads,
        compiled=compiled,
        exported=[to for to in exported.split(",") if to],
        device=device,
    )
    print(f"{found.gflop:.1f} GFLOP at {found.gflops:.0f} GFLOP/s: floor {found.floor:.0f} ms")
    own = {name: getattr(found, name) for name in ("plain", "optimised", "encoder", "decoder")}
    for name, milliseconds in (own | found.others).items():
        print(f"{name}: {milliseconds:.1f} ms, {milliseconds / found.floor:.2f} of the floor")
    print(f"decoder and collapse: {found.decoder / found.encoder:.3f} of the encoder")


@bench_app.command()
def limit(
    sizes: Annotated[str, typer.Option(help="Sizes of teacher and student.")] = "nano,base",
    side: Annotated[int | None, typer.Option(min=32, help="Side of the pictures; else 128 of nano, 480.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Weights and pictures in bfloat16.")] = False,
    tflops: Annotated[float, typer.Option(help="Of a GPU to derive times for: 10^12 FLOPs a second.")] = 312,
    bandwidth: Annotated[float, typer.Option(help="Of its memory, in GB a second.")] = 1555,
    launch: Annotated[float, typer.Option(help="Microseconds to start a kernel.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Folder for limit.json and limit.svg.")] = None,
) -> None:
    """Measure what bounds the speed-up, check what that predicts on runs it has not seen, and derive it for a GPU."""
    import json

    import torch

    from narvl_plugin import bench, bench_limit

    gpu = bench_limit.Processor(tflops * 1e12, bandwidth * 1e9, launch * 1e-6)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    found, drawn = {}, {}
    for size in sizes.split(","):
        pixels = side or (128 if size == "nano" else 480)
        pair = bench_limit.Pair(size, side=pixels, device=device, dtype=dtype)
        measured = bench_limit.limit(pair, size, repeats=repeats, threads=threads)
        derived = bench_limit.derive(pair, gpu)
        found[size] = {**measured.as_json(), "side": pixels, "derived": vars(derived)}
        drawn |= {f"{size}": measured.parts, f"{size}, derived for a GPU, not measured": derived}
        print(f"{size}, {pixels} pixels, {device}, {dtype}")
        print(bench_limit.table(measured, derived))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        machine = bench.describe_machine(torch.device(device), threads, dtype)
        result = {"machine": machine, "gpu": vars(gpu), "sizes": found}
        (out / "limit.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        bench_limit.draw(out / "limit.svg", drawn, beam=5)


@bench_app.command()
def loss(
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure the loss (16 samples, 20 queries, 59,458 labels), forward and backward, beside torch's ctc_loss."""
    import torch

    from narvl_plugin import bench_loss

    torch.set_num_threads(threads)
    costs = bench_loss.loss_costs(device=device)
    for name, cost in costs.items():
        memory = f"{cost.extra_mb:.0f} MiB, " if cost.extra_mb is not None else ""
        print(f"{name}: {cost.ms:.1f} ms, {memory}error of the gradient {cost.error:.1e}")
    ours, theirs = costs["query_ctc"], costs["torch"]
    print(f"ratio: {ours.ms / theirs.ms:.2f} of the time", end="")
    print(f", {ours.extra_mb / theirs.extra_mb:.2f} of the memory" if ours.extra_mb is not None else "")


@bench_app.command()
def training(
    size: Annotated[str, typer.Option(help="nano, tiny, medium, base, large or huge.")] = "nano",
    side: Annotated[int | None, typer.Option(min=32, help="Side of the pictures; else 128 of nano, 480.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 16,
    features: Annotated[
        bool, typer.Option("--features", help="Not pictures, but the trunk's features of them.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Forward pass and loss in autocast.")] = False,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Also with the model's option of this name.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="TSV file, to measure how long steps wait for batches.")] = None,
    task: Annotated[str, typer.Option(help="The file's: caption, refcoco, snli_ve or vqa_gen.")] = "caption",
    bpe_dir: Annotated[Path | None, typer.Option(help="Vocabulary's folder for --data.")] = None,
) -> None:
    """Time a student's training by parts of a step, with fairseq's Adam and the fused one, and its waiting for data."""
    from narvl_plugin import bench_training

    if data is not None and bpe_dir is None:
        raise InputError("--data: give the vocabulary's folder, too, by --bpe-dir")
    pixels = side or (128 if size == "nano" else 480)
    common: dict[str, Any] = {"side": pixels, "batch": batch, "device": device}
    if data is not None and bpe_dir is not None:
        found = bench_training.wait_for_batches(
            data, task=task, bpe_dir=bpe_dir, size=size, batches=repeats, threads=threads, **common
        )
        print(
            f"{data}, {bench_training.WORKERS} worker: {found.wait:.2f} ms wait for a batch, {found.step:.1f} "
            f"ms step, share of waiting {found.share:.2%} ({found.batches} batches)"
        )
    variants: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in bench_training.OPTIMIZERS}
    if checkpoint_activations:
        variants["checkpoint_activations"] = {"optimizer": "fused_adam", "checkpoint_activations": True}
    steps = {
        name: bench_training.TrainingStep(size, features=features, bfloat16=bfloat16, **common, **options)
        for name, options in variants.items()
    }
    print(bench_training.table(bench_training.step_costs(steps, repeats=repeats, threads=threads)))


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
