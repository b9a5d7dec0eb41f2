"""The commands `narvl bench …`; each imports what it runs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from narvl_plugin.cli.options import Ans2LabelFile, BpeDir, MaxLenB, NoRepeat, overrides
from narvl_plugin.errors import InputError
from narvl_plugin.whole_files import require_writable, write_whole

app = typer.Typer(no_args_is_help=True)


@app.command()
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
    """Time teacher (beam 5, greedy, all answers of a list) and student, one picture at a time, in turns."""
    from narvl_plugin.bench import timing

    given = {"max_len_b": max_len_b, "no_repeat_ngram_size": no_repeat_ngram_size}
    result = timing.latency(
        out,
        teacher=teacher,
        student=student,
        data=data,
        generation={name: value for name, value in given.items() if value is not None},
        task_overrides=overrides(bpe_dir, ans2label_file),
        images=images,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    for name, times in result["systems"].items():
        print(f"{name}: p50 {times['p50_ms']:.1f} ms, p95 {times['p95_ms']:.1f} ms, n {times['n']}")
    for name, times in result["stages"].items():
        print(f"{name}, ms: " + ", ".join(f"{stage} {milliseconds:.1f}" for stage, milliseconds in times.items()))


@app.command()
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
    from narvl_plugin.bench import systems

    result = systems.compare(
        out,
        teacher=teacher,
        student=student,
        data=data,
        exported=exported or [],
        compiled=compiled,
        task_overrides=overrides(bpe_dir, ans2label_file),
        images=images,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    print(systems.table(result))


@app.command()
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
    from narvl_plugin.bench import decoding

    result = decoding.decoding(
        out,
        student=student,
        data=data,
        teacher=teacher,
        frequencies=frequencies,
        task_overrides=overrides(bpe_dir, ans2label_file),
        images=images,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    print(decoding.table(result))


@app.command()
def search() -> None:
    """Time beam search (16 sentences, 20 queries, 59,458 labels) beside other packages, and lists of 3,129 answers."""
    from narvl_plugin.bench import decoding

    for name, milliseconds in decoding.beam_search_speeds().items():
        print(f"beam 8, {name}: {milliseconds:.2f} ms a sentence")
    for name, milliseconds in decoding.answer_list_speeds().items():
        print(f"3,129 answers, {name}: {milliseconds:.2f} ms a picture")


@app.command()
def floor(
    size: Annotated[str, typer.Option(help="nano, tiny, medium, base, large or huge.")] = "base",
    side: Annotated[int, typer.Option(min=32, help="Side of the picture, in pixels.")] = 480,
    queries: Annotated[int, typer.Option(min=1, help="Queries of the student.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 2,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Also with products in bfloat16.")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="Also by torch.compile, which takes minutes.")] = False,
    exported: Annotated[str, typer.Option(help="Also by graphs of narvl export, such as onnx,openvino.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Time a student, one picture at a time, beside its FLOPs at the rate of a matrix product measured in turns."""
    from narvl_plugin.bench.floor import distance_to_floor

    found = distance_to_floor(
        size=size,
        side=side,
        queries=queries,
        repeats=repeats,
        threads=threads,
        bfloat16=bfloat16,
        compiled=compiled,
        exported=[to for to in exported.split(",") if to],
        device=device,
    )
    print(f"{found.gflop:.1f} GFLOP at {found.gflops:.0f} GFLOP/s: floor {found.floor:.0f} ms")
    own = {name: getattr(found, name) for name in ("plain", "optimised", "encoder", "decoder")}
    for name, milliseconds in (own | found.others).items():
        print(f"{name}: {milliseconds:.1f} ms, {milliseconds / found.floor:.2f} of the floor")
    print(f"decoder and collapse: {found.decoder / found.encoder:.3f} of the encoder")


@app.command()
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

    from narvl_plugin.bench import limit, timing

    if out is not None:
        require_writable(out, folder=True)
    gpu = limit.Processor(tflops * 1e12, bandwidth * 1e9, launch * 1e-6)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    found, drawn = {}, {}
    for size in sizes.split(","):
        pixels = side or _usual_side(size)
        pair = limit.Pair(size, side=pixels, device=device, dtype=dtype)
        measured = limit.limit(pair, size, repeats=repeats, threads=threads)
        derived = limit.derive(pair, gpu)
        found[size] = {**measured.as_json(), "side": pixels, "derived": vars(derived)}
        drawn |= {f"{size}": measured.parts, f"{size}, derived for a GPU, not measured": derived}
        print(f"{size}, {pixels} pixels, {device}, {dtype}")
        print(limit.table(measured, derived))
    if out is not None:
        machine = timing.describe_machine(torch.device(device), threads, dtype)
        result = {"machine": machine, "gpu": vars(gpu), "sizes": found}
        write_whole(out / "limit.json", json.dumps(result, indent=2) + "\n")
        limit.draw(out / "limit.svg", drawn, beam=5)


@app.command()
def sweep(
    size: Annotated[str, typer.Option(help="Size of teacher and student.")] = "base",
    side: Annotated[int | None, typer.Option(min=32, help="Side of the picture; else 128 of nano, 480.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens that the teacher says.")] = "1,2,5,10,20",
    queries: Annotated[str, typer.Option(help="Queries of the student.")] = "3,6,10,20,30",
    beam: Annotated[int, typer.Option(min=1, help="Of the teacher.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Weights and pictures in bfloat16.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for sweep.json and sweep.svg.")] = None,
) -> None:
    """Measure the speed-up over the number of queries and the length of the output, one picture at a time."""
    import json

    import torch

    from narvl_plugin.bench import limit, sweep, timing

    if out is not None:
        require_writable(out, folder=True)
    asked_lengths, asked_queries = _numbers("--lengths", lengths), _numbers("--queries", queries)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    pixels = side or _usual_side(size)
    pair = limit.Pair(size, side=pixels, device=device, dtype=dtype)
    found = sweep.sweep(
        pair, size, lengths=asked_lengths, queries=asked_queries, beam=beam, repeats=repeats, threads=threads
    )
    print(f"{size}, {pixels} pixels, beam {beam}, {device}, {dtype}")
    print(sweep.table(found), end="")
    if out is not None:
        machine = timing.describe_machine(torch.device(device), threads, dtype)
        result = {"machine": machine, "side": pixels, **vars(found)}
        write_whole(out / "sweep.json", json.dumps(result, indent=2) + "\n")
        sweep.draw(out / "sweep.svg", found)


@app.command()
def loss(
    threads: Annotated[int, typer.Option(min=1, help="torch's threads.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure the loss (16 samples, 20 queries, 59,458 labels), forward and backward, beside torch's ctc_loss."""
    import torch

    from narvl_plugin.bench import loss

    torch.set_num_threads(threads)
    costs = loss.loss_costs(device=device)
    for name, cost in costs.items():
        memory = f"{cost.extra_mb:.0f} MiB, " if cost.extra_mb is not None else ""
        print(f"{name}: {cost.ms:.1f} ms, {memory}error of the gradient {cost.error:.1e}")
    ours, theirs = costs["query_ctc"], costs["torch"]
    print(f"ratio: {ours.ms / theirs.ms:.2f} of the time", end="")
    print(f", {ours.extra_mb / theirs.extra_mb:.2f} of the memory" if ours.extra_mb is not None else "")


@app.command()
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
    from narvl_plugin.bench import training

    if data is not None and bpe_dir is None:
        raise InputError("--data: give the vocabulary's folder, too, by --bpe-dir")
    pixels = side or _usual_side(size)
    common: dict[str, Any] = {"side": pixels, "batch": batch, "device": device}
    if data is not None and bpe_dir is not None:
        found = training.wait_for_batches(
            data, task=task, bpe_dir=bpe_dir, size=size, batches=repeats, threads=threads, **common
        )
        print(
            f"{data}, {training.WORKERS} worker: {found.wait:.2f} ms wait for a batch, {found.step:.1f} "
            f"ms step, share of waiting {found.share:.2%} ({found.batches} batches)"
        )
    variants: dict[str, dict[str, Any]] = {name: {"optimizer": name} for name in training.OPTIMIZERS}
    if checkpoint_activations:
        variants["checkpoint_activations"] = {"optimizer": "fused_adam", "checkpoint_activations": True}
    steps = {
        name: training.TrainingStep(size, features=features, bfloat16=bfloat16, **common, **options)
        for name, options in variants.items()
    }
    print(training.table(training.step_costs(steps, repeats=repeats, threads=threads)))


def _usual_side(size: str) -> int:
    """Return the side of the pictures that models of a size read, in pixels."""
    return 128 if size == "nano" else 480


def _numbers(option: str, given: str) -> list[int]:
    """Read positive numbers joined by commas; raises InputError."""
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise InputError(f"{option} {given}: give numbers from 1 on, joined by commas")
    return numbers
