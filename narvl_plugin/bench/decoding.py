"""Quality and cost of a student's decoding methods, and beam search compared with other CTC decoders."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from narvl_plugin.bench.timing import describe_machine, in_turns, measure_latency, use_threads
from narvl_plugin.ctc import build_trie, prefix_beam_search, score_trie
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.inference.calibration import Reliability
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models import build
from narvl_plugin.models.encoder import EncoderOutput
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.report.results import markdown_table
from narvl_plugin.tasks.base import BaseTask, Search
from narvl_plugin.tasks.caption import CaptionTask
from narvl_plugin.whole_files import require_writable, write_whole

SPLIT = "test"
FREE = "greedy, nothing ruled out"


@dataclass(frozen=True)
class Decoded:
    """The quality and cost of a decoding method.

    Attributes:
        quality: the mean of the task's validation score.
        invalid: the number of invalid outputs.
        score: the mean log-probability of the outputs, in nats.
        error: the expected calibration error.
        p50_ms: the median time for one image.
        others: the means of the task's other validation scores, such as the share of captions that are true.
        replaced: the number of outputs that are no sentence of an n-gram automaton.
    """

    quality: float
    invalid: int
    score: float
    error: float
    p50_ms: float
    others: dict[str, float]
    replaced: int


def ways_to_decode(
    task: BaseTask, teacher: Path | None, frequencies: Path | None, ngrams: Sequence[Path] = ()
) -> dict[str, Search]:
    """Return the decoding methods of a task's students by name, `FREE` first; see `BaseTask.ways_to_decode`."""
    return {FREE: Search({"beam": 1}, {}), **task.ways_to_decode(teacher, frequencies, ngrams)}


def decoding(
    out: Path,
    *,
    student: Path,
    data: Path,
    teacher: Path | None = None,
    frequencies: Path | None = None,
    ngrams: Sequence[Path] = (),
    task_overrides: Mapping[str, Any] | None = None,
    images: int = 50,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Decode a TSV file's rows with every decoding method of the student's task, and time each on the first rows.

    Args:
        out: the JSON file to write.
        student: the student's checkpoint.
        data: the TSV file with images.
        teacher: a teacher's checkpoint to rescore with.
        frequencies: a TSV file of captions; its n-gram counts give the expected CIDEr of captions, and captions are
            judged by its wording.
        ngrams: files of `narvl ngrams`.
        task_overrides: see `Predictor.load`.
        images: the number of rows to time.
        repeats: see `measure_latency`.
        threads: see `measure_latency`.
        device: ``cpu`` or ``cuda``.

    Returns:
        The contents of the file: ``ways`` (`Decoded` by name), ``rows``, ``metric``, ``machine``.

    Raises:
        InputError: for files that cannot be used.
    """
    require_writable(out)
    loaded = Predictor.load(student, data, task_overrides=task_overrides, role="student", device=device)
    task = loaded.task
    ways = ways_to_decode(task, teacher, frequencies, ngrams)
    predictors = {name: loaded.with_options(way.task_options, **way.generation) for name, way in ways.items()}
    predictors[FREE].generator = ParallelGenerator([cast(NarvlModel, loaded.model)], task.target_dictionary)
    rows = list(loaded.usable_rows())
    if isinstance(task, CaptionTask) and frequencies is not None:
        task.know_captions(frequencies)
    main, *others = task.validation_metrics
    found: dict[str, list[tuple[float, bool, float, float, float]]] = {name: [] for name in predictors}
    beside: dict[str, dict[str, list[float]]] = {name: {} for name in predictors}
    with torch.inference_mode(), use_threads(threads):
        for row in rows:
            batch = loaded.batch(row)
            for name, predictor in predictors.items():
                said = [predictor.hypotheses(batch)]
                best = said[0][0]
                judged = task.validation_scores(batch, said)
                (quality,) = judged[main]
                for other in others:
                    if judged.get(other):  # some scores are of some rows only
                        beside[name].setdefault(other, []).extend(judged[other])
                (right,) = task.correctness(batch, said)
                sure = task.confidence(said[0])
                found[name].append((quality, task.is_invalid(best["tokens"]), float(best["score"]), sure, right))
    replaced = {name: getattr(predictor.generator.constraint, "replaced", 0) for name, predictor in predictors.items()}
    stats = measure_latency(predictors, rows[:images], warmup=5, repeats=repeats, threads=threads)
    decoded = {}
    for name, results in found.items():
        qualities, invalid, scores, confidences, correct = map(np.array, zip(*results, strict=True))
        decoded[name] = Decoded(
            quality=float(qualities.mean()),
            invalid=int(invalid.sum()),
            score=float(scores.mean()),
            error=Reliability.of(confidences.clip(0, 1), correct).error,
            p50_ms=stats[name].p50_ms,
            others={other: float(np.mean(values)) for other, values in beside[name].items()},
            replaced=replaced[name],
        )
    result = {
        "ways": {name: asdict(worth) for name, worth in decoded.items()},
        "rows": len(rows),
        "metric": main,
        "machine": describe_machine(loaded.device, threads, next(loaded.model.parameters()).dtype),
    }
    write_whole(out, json.dumps(result, indent=2) + "\n")
    return result


def table(result: Mapping[str, Any]) -> str:
    """Format the result of `decoding` as a Markdown table."""
    others = next(iter(result["ways"].values()))["others"]
    rows = [
        [name, f"{way['quality']:.3f}", *(f"{way['others'][other]:.3f}" for other in others)]
        + [f"{way['invalid']}", f"{way['score']:.2f}", f"{way['error']:.3f}", f"{way['p50_ms']:.1f}"]
        for name, way in result["ways"].items()
    ]
    headings = ["decoding", result["metric"], *(other.replace("_", " ") for other in others)]
    headings += ["invalid", "log p", "calibration error", "p50 ms"]
    return markdown_table(headings, rows)


@torch.inference_mode()
def beam_search_speeds(
    *, batch: int = 16, queries: int = 20, labels: int = 59_458, beam: int = 8, top_k: int = 16, repeats: int = 5
) -> dict[str, float]:
    """Time beam search on synthetic distributions, compared with the installed packages, in ms a sentence.

    At each query, six labels share most of the probability. All searches take turns on the same numbers.
    `ctc-beam-decoder` tries labels above its default probability, and `fast-ctc-decode` those above 1e-5.

    Args:
        batch: the number of sentences.
        queries: the number of queries N.
        labels: the number of labels V.
        beam: the beam width.
        top_k: the number of labels that extend an output at each query.
        repeats: see `in_turns`.

    Returns:
        The times by name.
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(batch, queries, labels, generator=generator)
    likely = torch.randint(1, labels, (batch, queries, 6), generator=generator)
    logits.scatter_(2, likely, 12 + 4 * torch.rand(batch, queries, 6, generator=generator))
    logits[:, :, 0] += 12
    log_probs = logits.log_softmax(2)
    arrays = log_probs.numpy()
    names = [f"w{label} " for label in range(1, labels)]
    searches: dict[str, Callable[[], object]] = {
        "narvl": partial(prefix_beam_search, log_probs, blank=0, beam_size=beam, top_k=top_k)
    }
    other = optional("ctc_beam_decoder")
    if other is not None:
        last = np.ascontiguousarray(np.roll(arrays, -1, axis=2))  # its blank is the last label
        decoder = other.BeamSearchDecoder([name.strip() for name in names])
        searches["ctc-beam-decoder"] = lambda: [decoder.decode_beams(one, beam_width=beam) for one in last]
    other = optional("fast_ctc_decode")
    if other is not None:
        probabilities = np.exp(arrays)
        alphabet = ["", *names]
        searches["fast-ctc-decode"] = lambda: [
            other.beam_search(one, alphabet, beam_size=beam, beam_cut_threshold=1e-5) for one in probabilities
        ]
    times = in_turns(searches, repeats=repeats, threads=1)  # the other packages use one thread
    return {name: milliseconds / batch for name, milliseconds in times.items()}


@torch.inference_mode()
def answer_list_speeds(
    *, answers: int = 3129, queries: int = 6, labels: int = 59_458, size: str = "base", part: int = 32, repeats: int = 5
) -> dict[str, float]:
    """Time the scoring of a synthetic answer list for one image, in ms.

    The student's time is what follows its one forward pass, exact for all answers of one to four tokens. The teacher's
    time is its decoder's pass over all answers of three tokens. It is timed on `part` of them and multiplied. Both
    models have random weights. The image has 900 patches.

    Args:
        answers: the number of answers.
        queries: the number of queries N.
        labels: the number of labels V.
        size: the size of the teacher, such as ``base``.
        part: the number of answers that the teacher's time is measured on.
        repeats: see `in_turns`.

    Returns:
        The times of ``student`` and ``teacher``.
    """
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 5, (answers,), generator=generator)
    candidates = torch.randint(4, labels - 1, (answers, 4), generator=generator)
    log_probs = torch.randn(1, queries, labels, generator=generator).log_softmax(2)
    trie = build_trie(candidates, lengths)
    teacher = build(f"ofa_{size}", vocab_size=labels - 1).eval()
    width, sources = teacher.cfg.encoder_embed_dim, 910
    one = EncoderOutput(
        torch.randn(1, sources, width, generator=generator), None, torch.randn(sources, width, generator=generator)
    )
    memory = teacher.encoder.reorder_encoder_out(one, torch.zeros(part, dtype=torch.int64))
    systems: dict[str, Callable[[], object]] = {
        "student": lambda: score_trie(log_probs, trie, blank=labels - 1),
        "teacher": lambda: teacher.decoder(candidates[:part, :3], memory),
    }
    times = in_turns(systems, repeats=repeats, threads=torch.get_num_threads())
    return {"student": times["student"], "teacher": times["teacher"] * answers / part}


def optional(name: str) -> Any:
    """Return a package, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
