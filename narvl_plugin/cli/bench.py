"""The commands `narvl bench …`. Each imports what it needs only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from narvl_plugin.cli.options import (
    Ans2LabelFile,
    AnyModel,
    BatchSize,
    Beam,
    BpeDir,
    Compiled,
    Data,
    Device,
    ImageFiles,
    InBfloat16,
    JsonFile,
    MaxLenB,
    NgramAutomaton,
    NoRepeat,
    Repeats,
    SearchBeam,
    Side,
    Size,
    Student,
    Task,
    Teacher,
    Threads,
    TimedDevice,
    TimedImages,
    overrides,
    with_ngrams,
)
from narvl_plugin.errors import InputError
from narvl_plugin.whole_files import require_writable, write_whole

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command()
def latency(
    teacher: Teacher,
    student: Student,
    data: Data,
    out: JsonFile,
    images: TimedImages = 100,
    repeats: Repeats = 3,
    threads: Threads = 1,
    max_len_b: MaxLenB = None,
    no_repeat_ngram_size: NoRepeat = None,
    ngram_automaton: NgramAutomaton = None,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    device: TimedDevice = "cpu",
) -> None:
    """Time a teacher and a student on one image at a time.

    The median of batches of 32 images is printed beside. The teacher runs with a beam of 5, greedily, and over all
    answers of a list if it has one. Teacher and student take turns.
    """
    from narvl_plugin.bench import timing

    given = {"max_len_b": max_len_b, "no_repeat_ngram_size": no_repeat_ngram_size}
    result = timing.latency(
        out,
        teacher=teacher,
        student=student,
        data=data,
        generation={name: value for name, value in given.items() if value is not None},
        task_overrides=overrides(bpe_dir, ans2label_file),
        student_options=with_ngrams(ngram_automaton),
        images=images,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    for name, times in result["systems"].items():
        print(
            f"{name}: p50 {times['p50_ms']:.1f} ms, p95 {times['p95_ms']:.1f} ms, n {times['n']}; "
            f"in batches {times['batched_ms']:.1f} ms an image"
        )
    for name, times in result["stages"].items():
        print(f"{name}, ms: " + ", ".join(f"{stage} {milliseconds:.1f}" for stage, milliseconds in times.items()))


@app.command()
def models(
    teacher: Teacher,
    student: Student,
    data: Data,
    out: Annotated[Path, typer.Option(help="JSON file to write. A plot is written beside it.")],
    exported: Annotated[
        list[Path] | None, typer.Option(help="Folder of narvl export. The option may be repeated.")
    ] = None,
    compiled: Compiled = False,
    images: TimedImages = 100,
    repeats: Repeats = 3,
    threads: Threads = 1,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    device: TimedDevice = "cpu",
) -> None:
    """Compare a teacher, a student and exported students.

    Each way of decoding is measured by quality, latency, images/s and the time of its stages.
    """
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
    student: Student,
    data: Data,
    out: JsonFile,
    teacher: Annotated[Path | None, typer.Option(help="Checkpoint of a teacher that rescores.")] = None,
    frequencies: Annotated[Path | None, typer.Option(help="TSV file of captions whose n-grams are counted.")] = None,
    ngram_automaton: Annotated[
        list[Path] | None, typer.Option(help="File of narvl ngrams. The option may be repeated.")
    ] = None,
    images: TimedImages = 50,
    repeats: Repeats = 3,
    threads: Threads = 1,
    bpe_dir: BpeDir = None,
    ans2label_file: Ans2LabelFile = None,
    device: TimedDevice = "cpu",
) -> None:
    """Compare all ways to decode a student.

    The measures are quality, the number of invalid outputs, calibration error and latency.
    """
    from narvl_plugin.bench import decoding

    result = decoding.decoding(
        out,
        student=student,
        data=data,
        teacher=teacher,
        frequencies=frequencies,
        ngrams=ngram_automaton or [],
        task_overrides=overrides(bpe_dir, ans2label_file),
        images=images,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    print(decoding.table(result))


@app.command()
def search() -> None:
    """Time the student's search beside other packages.

    The beam search reads 16 sentences of 20 queries and 59,458 labels. The list of answers has 3,129 entries.
    """
    from narvl_plugin.bench import decoding

    for name, milliseconds in decoding.beam_search_speeds().items():
        print(f"beam 8, {name}: {milliseconds:.2f} ms per sentence")
    for name, milliseconds in decoding.answer_list_speeds().items():
        print(f"3,129 answers, {name}: {milliseconds:.2f} ms per image")


@app.command()
def floor(
    size: Size = "base",
    side: Annotated[int, typer.Option(min=32, help="Side of the image, in pixels.")] = 480,
    queries: Annotated[int, typer.Option(min=1, help="Number of the student's queries.")] = 20,
    repeats: Repeats = 5,
    threads: Threads = 2,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Also time products in bfloat16.")] = False,
    compiled: Compiled = False,
    exported: Annotated[str, typer.Option(help="Also time formats of narvl export, such as onnx,openvino.")] = "",
    device: TimedDevice = "cpu",
) -> None:
    """Time a student beside the least time for its FLOPs.

    The student reads one image at a time. The least time follows from the rate of a matrix product, which is measured
    in turns with the student.
    """
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
    sizes: Annotated[str, typer.Option(help="Sizes of teacher and student, joined by commas.")] = "nano,base",
    side: Side = None,
    repeats: Repeats = 3,
    threads: Threads = 2,
    device: TimedDevice = "cpu",
    bfloat16: InBfloat16 = False,
    tflops: Annotated[
        float, typer.Option(help="Speed of the GPU to derive times for, in 10^12 FLOPs per second.")
    ] = 312,
    bandwidth: Annotated[float, typer.Option(help="Bandwidth of the GPU's memory, in GB per second.")] = 1555,
    launch: Annotated[float, typer.Option(help="Time to start a kernel on the GPU, in microseconds.")] = 8,
    out: Annotated[Path | None, typer.Option(help="Folder for limit.json and limit.svg.")] = None,
) -> None:
    """Measure what bounds the speed-up of the student.

    Times that are predicted from the measured parts are checked on further runs, and derived for a GPU.
    """
    import json

    import torch

    from narvl_plugin.bench import limit, timing

    if out is not None:
        require_writable(out, folder=True)
    gpu = limit.Processor(tflops * 1e12, bandwidth * 1e9, launch * 1e-6)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    found: dict[str, dict[str, Any]] = {}
    drawn: dict[str, limit.Parts] = {}
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
    size: Size = "base",
    side: Side = None,
    lengths: Annotated[
        str, typer.Option(help="Lengths of the teacher's output, in tokens, joined by commas.")
    ] = "1,2,5,10,20",
    queries: Annotated[str, typer.Option(help="Numbers of the student's queries, joined by commas.")] = "3,6,10,20,30",
    beam: Beam = 5,
    repeats: Repeats = 3,
    threads: Threads = 2,
    device: TimedDevice = "cpu",
    bfloat16: InBfloat16 = False,
    out: Annotated[Path | None, typer.Option(help="Folder for sweep.json and sweep.svg.")] = None,
) -> None:
    """Measure the speed-up by number of queries and output length.

    Teacher and student read one image at a time.
    """
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
    threads: Threads = 2,
    device: TimedDevice = "cpu",
    structured: Annotated[
        bool, typer.Option("--structured", help="Measure the loss of sets beside that of sequences instead.")
    ] = False,
) -> None:
    """Measure the loss beside torch's ctc_loss.

    Each runs forward and backward on 16 samples of 20 queries and 59,458 labels. With --structured, the loss of sets of
    five elements of five tokens is measured beside that of the same tokens in one order, on 32 samples of 48 queries.
    """
    import torch

    from narvl_plugin.bench import loss

    torch.set_num_threads(threads)
    if structured:
        times = loss.structured_costs(device=device)
        for name, ms in times.items():
            print(f"{name}: {ms:.1f} ms")
        print(f"ratio: {times['set'] / times['sequence']:.2f} of the time")
        return
    costs = loss.loss_costs(device=device)
    for name, cost in costs.items():
        memory = f"{cost.extra_mb:.0f} MiB, " if cost.extra_mb is not None else ""
        print(f"{name}: {cost.ms:.1f} ms, {memory}error of the gradient {cost.error:.1e}")
    ours, theirs = costs["query_ctc"], costs["torch"]
    ratio = f"ratio: {ours.ms / theirs.ms:.2f} of the time"
    if ours.extra_mb is not None and theirs.extra_mb is not None:
        ratio += f", {ours.extra_mb / theirs.extra_mb:.2f} of the memory"
    print(ratio)


@app.command()
def gpu(
    out: JsonFile,
    size: Size = "base",
    side: Side = None,
    device: Device = None,
) -> None:
    """Measure all that a GPU is measured for, in at most six minutes.

    These are the loss beside torch's, a single image, the throughput, and the training with its input. Models have
    random weights. A part that might not end in time is skipped. The times that parts are given are those of a GPU: a
    CPU takes longer, and should measure --size nano.
    """
    from narvl_plugin.bench.gpu import Scale, measure, table
    from narvl_plugin.devices import choose_device

    scale = Scale(size=size, side=side or _usual_side(size))
    print(table(measure(out, scale, device=choose_device(device))), end="")


@app.command()
def training(
    size: Size = "nano",
    side: Side = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 16,
    features: Annotated[
        bool, typer.Option("--features", help="Train on the backbone's features instead of images.")
    ] = False,
    repeats: Repeats = 5,
    threads: Threads = 1,
    device: TimedDevice = "cpu",
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Run forward pass and loss under autocast.")] = False,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Also time the model's option of this name.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="TSV file, to also measure how long steps wait for batches.")
    ] = None,
    task: Task = "caption",
    bpe_dir: Annotated[Path | None, typer.Option(help="Folder of the vocabulary for --data.")] = None,
) -> None:
    """Time the parts of a student's training step.

    Steps run with fairseq's Adam and with the fused one. With --data, the time that steps wait for batches is measured.
    """
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
            f"{data}, {training.WORKERS} worker: {found.wait:.2f} ms wait per batch, {found.step:.1f} "
            f"ms per step, share of waiting {found.share:.2%} ({found.batches} batches)"
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
    """Return the side of the images that models of a size read, in pixels."""
    return 128 if size == "nano" else 480


def _numbers(option: str, given: str) -> list[int]:
    """Read positive numbers joined by commas.

    Raises:
        InputError: if anything else was given.
    """
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise InputError(f"{option} {given}: give numbers from 1 on, joined by commas")
    return numbers


@app.command()
def startup(
    student: Annotated[Path | None, typer.Option(help="Checkpoint of captions, to time one.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image to caption.")] = None,
    repeats: Repeats = 5,
) -> None:
    """Time the start of programs, each in a fresh process.

    The table compares them with the import of torch alone.
    """
    from narvl_plugin.bench.startup import commands, startup, table

    print(table(startup(commands(student, image), repeats=repeats)))


@app.command()
def api(
    student: Annotated[
        Path | None, typer.Option(help="Checkpoint of a student. By default the model in the box.")
    ] = None,
    exported: Annotated[Path | None, typer.Option(help="Folder of narvl export, to time it beside its run.py.")] = None,
    images: TimedImages = 20,
    repeats: Repeats = 5,
    threads: Threads = 1,
) -> None:
    """Time the API, from an image to a prediction.

    The table compares it with the parts that it cannot do without: image transform, network, search and text.
    """
    from narvl_plugin.bench.api import compare, table

    print(table(compare(student, exported, images=images, repeats=repeats, threads=threads)))


@app.command()
def serve(
    student: Student,
    out: JsonFile,
    clients: Annotated[int, typer.Option(min=1, help="Clients that send at once.")] = 32,
    requests: Annotated[int, typer.Option(min=1, help="Number of requests in each turn.")] = 512,
    images: Annotated[int, typer.Option(min=1, help="Number of images, which the requests repeat.")] = 512,
    bad: Annotated[float, typer.Option(min=0, max=1, help="Share of bad requests, which must be refused.")] = 0.0,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Largest batch of the server with batching.")] = 8,
    repeats: Repeats = 3,
    threads: Threads = 1,
    bpe_dir: BpeDir = None,
    device: TimedDevice = "cpu",
) -> None:
    """Time narvl serve under load, with batching and without.

    The servers take turns with one process that captions the same images. Each answer is compared with that process's.

    Example of a long check: narvl bench serve --student CKPT --out FILE.json --requests 10000 --clients 64 --bad 0.05
    """
    from narvl_plugin.bench import serving

    result = serving.serving(
        out,
        student=student,
        bpe_dir=bpe_dir,
        images=images,
        requests=requests,
        clients=clients,
        bad=bad,
        max_batch_size=max_batch_size,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    print(serving.table(result))


@app.command()
def bulk(
    out: JsonFile,
    student: Annotated[
        Path | None, typer.Option(help="Checkpoint of a student of captions. By default the model in the box.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of small images.")] = 5000,
    actors: Annotated[int, typer.Option(min=1, help="Actors of Ray, each with a model.")] = 1,
    batch_size: BatchSize = 8,
    repeats: Repeats = 3,
    threads: Threads = 1,
    device: TimedDevice = "cpu",
) -> None:
    """Time bulk inference in one process and on Ray.

    Both engines take turns on the same images, each turn in a process of its own. The start of Ray is measured apart.
    Their outputs are compared byte by byte. With one actor the ratio is what Ray adds to an image.
    """
    from narvl_plugin.bench.bulk import bulk, table
    from narvl_plugin.bulk.engines import require_ray

    require_ray()
    result = bulk(
        out,
        student=student,
        images=images,
        actors=actors,
        batch_size=batch_size,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    print(table(result))


@app.command()
def plan(
    sample: ImageFiles,
    images: Annotated[float, typer.Option(min=1, max=1e15, help="Number of images of the job, such as 100e6.")],
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, or of CPU processes, joined by commas.")] = "1,8,64,512",
    shard_rows: Annotated[
        int, typer.Option(min=1, help="Images of a shard. It is 1000, but of archives and Parquet files as they are.")
    ] = 1000,
    checkpoint: AnyModel = None,
    batch_size: BatchSize = 32,
    beam: SearchBeam = None,
    repeats: Repeats = 3,
    threads: Threads = 1,
    bpe_dir: BpeDir = None,
    device: Device = None,
) -> None:
    """Plan the captions of many images, from a sample of them.

    The sample is read and captioned here, to measure what an image costs. The table then has the hours on so many
    devices, the share of time without work, what the store must give, the CPU cores that read images, the time between
    two shards, and the most that each device repeats after its machine is lost.

    Example: narvl bench plan photos/ --images 100e6 --checkpoint student.pt
    """
    from narvl_plugin.bench.plan import Plan
    from narvl_plugin.bench.sample import describe, measure, table

    counts = _numbers("--gpus", gpus)
    costs, measured = measure(
        sample,
        checkpoint=checkpoint,
        bpe_dir=bpe_dir,
        batch_size=batch_size,
        beam=beam,
        repeats=repeats,
        threads=threads,
        device=device,
    )
    plans = [Plan(costs, round(images), count, shard_rows) for count in counts]
    print(f"{measured} image(s) measured, in batches of {batch_size}")
    print(describe(costs))
    print(
        f"{plans[0].images:,} images: {images * costs.image_bytes / 1e12:,.3f} TB to read, "
        f"{images * costs.output_bytes / 1e9:,.3f} GB to write, {plans[0].shards:,} shards of "
        f"{plans[0].shard_seconds:,.1f} s each"
    )
    print(table(plans), end="")
