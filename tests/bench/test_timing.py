"""Latency measurement: order of the calls, percentiles, and what is refused."""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from narvl_plugin.bench import stages, timing
from narvl_plugin.bench.stages import STAGES
from narvl_plugin.bench.timing import (
    LatencyStats,
    describe_machine,
    images_per_second,
    latency,
    measure_latency,
)
from narvl_plugin.data.images import encode_features
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.generation.candidates import CandidateGenerator
from narvl_plugin.generation.options import generation_config
from narvl_plugin.generation.teacher import TrieSequenceGenerator
from narvl_plugin.inference import attention
from narvl_plugin.inference.attention import cross_attention
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models import build
from narvl_plugin.report import readings
from narvl_plugin.report.readings import QueryView, view_queries
from narvl_plugin.tasks.registered import (
    CaptionConfig,
    CaptionTask,
    RefcocoConfig,
    RefcocoTask,
    SnliVeConfig,
    SnliVeTask,
    VqaGenConfig,
    VqaGenTask,
)


class FakeClock:
    """A clock that only moves when a system works."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def worker(clock: FakeClock, calls: list[tuple[str, int]], name: str, seconds: float) -> Callable[[int], str]:
    """Make a system that takes a fixed time for each image and a bit more for higher ones."""

    def system(image: int) -> str:
        calls.append((name, image))
        clock.seconds += seconds * (1 + image)
        return name

    return system


def test_systems_take_turns_and_only_their_own_time_counts(clock: FakeClock) -> None:
    calls: list[tuple[str, int]] = []
    systems = {"a": worker(clock, calls, "a", 0.001), "b": worker(clock, calls, "b", 0.010)}
    stats = measure_latency(systems, [0, 1, 2], warmup=1, repeats=2, threads=1, turn=1)
    one_round = [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert calls == [("a", 0), ("b", 0), *one_round, *one_round]
    # 1, 2, 3, 1, 2, 3 ms: the median is 2 and the 95th percentile lies on the last step.
    assert stats["a"] == LatencyStats(pytest.approx(2.0), pytest.approx(3.0), pytest.approx(2.0), 6)
    assert stats["b"].p50_ms == pytest.approx(20.0)


def test_a_turn_of_several_images_begins_with_one_that_is_not_timed(clock: FakeClock) -> None:
    calls: list[tuple[str, int]] = []
    systems = {name: worker(clock, calls, name, 0.001) for name in "ab"}
    stats = measure_latency(systems, [0, 1, 2], warmup=0, repeats=1, threads=1, turn=2)
    assert [image for name, image in calls if name == "a"] == [1, 0, 1, 2, 2]
    assert "".join(name for name, _ in calls) == "aaabbbaabb"
    assert stats["a"] == LatencyStats(pytest.approx(2.0), pytest.approx(2.9), pytest.approx(2.0), 3)


def test_images_per_second_are_those_of_the_median_batch(clock: FakeClock) -> None:
    asked: list[list[int]] = []

    def system(rows: Sequence[int]) -> list[str]:
        asked.append(list(rows))
        clock.seconds += 0.5 if 0 in rows[:1] else 0.1
        return ["a dog"] * len(rows)

    speeds = images_per_second({"a": system}, range(5), batch_size=2, repeats=2, threads=1)
    one_round = [[0, 1], [2, 3], [4, 0]]
    assert asked == [[0, 1], *one_round, *one_round]
    assert speeds == {"a": pytest.approx(2 / 0.1)}


def test_threads_are_set_for_the_measurement_only() -> None:
    before = torch.get_num_threads()
    seen = []
    measure_latency(
        {"a": lambda _: str(seen.append(torch.get_num_threads()))},
        [0],
        warmup=0,
        repeats=1,
        threads=before + 1,
    )
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="0 systems, 1 images, 1 repeats"):
        measure_latency({}, [0], warmup=0, repeats=1, threads=1)
    with pytest.raises(ValueError, match="0 images"):
        measure_latency({"a": str}, [], warmup=0, repeats=1, threads=1)


def test_machine_names_what_latency_depends_on() -> None:
    machine = describe_machine(torch.device("cpu"), 3, torch.bfloat16)
    assert machine["threads"] == 3
    assert machine["precision"] == "bfloat16"
    assert machine["torch"] == torch.__version__
    assert machine["processor"]


Rows = list[list[str]]


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="gone.pt: no such checkpoint"):
        Predictor.load(tmp_path / "gone.pt", tmp_path / "test.tsv")


def test_unknown_generation_option_is_named() -> None:
    with pytest.raises(InputError, match="beams=5"):
        generation_config({"beams": 5})


@pytest.fixture
def pair(
    write_checkpoint: Callable[..., Path], write_tsv: Callable[..., Path], caption_rows: Rows, vocabulary: Path
) -> dict[str, Path]:
    """Give a teacher and a student of captions, and a file of captions."""
    common = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    common["eval_args"] = '{"beam": 7, "max_len_b": 30, "min_len": 2}'
    return {
        "teacher": write_checkpoint("teacher.pt", "ofa", "caption", **common),
        "student": write_checkpoint("student.pt", "narvl", "caption", **common),
        "data": write_tsv("test.tsv", caption_rows),
    }


@pytest.mark.integration
def test_latency_writes_all_three_systems(pair: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run" / "latency.json"
    report = latency(out, **pair, generation={"max_len_b": 4}, images=100, warmup=0, repeats=2)
    assert json.loads(out.read_text()) == report
    assert set(report["systems"]) == {"teacher_beam5", "teacher_greedy", "student"}
    assert all(stats["n"] == 12 and stats["batched_ms"] > 0 for stats in report["systems"].values())
    assert {name: set(stages) for name, stages in report["stages"].items()} == dict.fromkeys(
        report["systems"], set(STAGES)
    )
    assert report["settings"] == {
        **{"data": str(pair["data"]), "images": 6, "warmup": 0, "repeats": 2},
        **{"max_len_b": 4, "min_len": 2},  # those given, and beyond them the teacher's own
    }
    assert not out.with_name("latency.json.part").exists()


def test_latency_passes_over_rows_that_the_task_skips(
    pair: dict[str, Path], write_tsv: Callable[..., Path], caption_rows: Rows, tmp_path: Path
) -> None:
    for row in (0, 2, 4):  # the third bad row would be an error, and is not read
        caption_rows[row][4] = "no image"
    pair["data"] = write_tsv("bad.tsv", caption_rows)
    given = {"generation": {"max_len_b": 4}, "task_overrides": {"skip_bad_rows": 2}}
    report = latency(tmp_path / "latency.json", **pair, **given, images=2, warmup=0, repeats=1)
    assert report["settings"]["images"] == 2
    assert all(stats["n"] == 2 for stats in report["systems"].values())


def test_latency_refuses_precomputed_features(
    pair: dict[str, Path], write_tsv: Callable[..., Path], caption_rows: Rows, tmp_path: Path
) -> None:
    channels = Predictor.load(pair["student"]).model.encoder.embed_images.out_channels
    features = base64.b64encode(encode_features(torch.zeros(channels, 2, 2), (8, 6))).decode()
    pair["data"] = write_tsv("features.tsv", [[*row[:4], features] for row in caption_rows])
    with pytest.raises(InputError, match="features.tsv: holds precomputed features"):
        latency(tmp_path / "l.json", **pair)


SMALL = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "vision_trunk": "resnet18",
    "vision_pretrained": False,
}


@pytest.fixture
def make_predictor(
    write_tsv: Callable[..., Path], caption_rows: list[list[str]], vocabulary: Path
) -> Callable[..., Predictor]:
    """Make predictors with small random models on a few images."""
    data = write_tsv("test.tsv", caption_rows)

    def make(arch: str, generation: dict[str, Any] | None = None, **options: Any) -> Predictor:
        config = CaptionConfig(data=str(data), bpe_dir=str(vocabulary), patch_image_size=32, num_bins=10)
        task = CaptionTask.setup_task(config)
        task.load_dataset("test")
        torch.manual_seed(0)
        labels = len(task.target_dictionary) + arch.startswith("narvl")
        model = build(arch, vocab_size=labels, **SMALL, **options).eval()
        return Predictor(model, task, generation or {}, torch.device("cpu"))

    return make


@pytest.mark.parametrize(
    ("arch", "options", "generation"),
    [("narvl_nano", {"num_queries": 8}, {}), ("ofa_nano", {}, {"beam": 3, "max_len_b": 6})],
)
def test_one_image_at_a_time_says_what_a_batch_says(
    make_predictor: Callable[..., Predictor], arch: str, options: dict[str, Any], generation: dict[str, Any]
) -> None:
    predictor = make_predictor(arch, generation, **options)
    task, dataset = predictor.task, predictor.task.dataset("test")
    assert generation.items() <= predictor.generation.items()
    generator = task.build_generator([predictor.model], generation_config(predictor.generation))
    batch = dataset.collater([dataset[row] for row in range(len(dataset))])
    together = [
        task.codec.decode(best["tokens"]) for best, *_ in task.inference_step(generator, [predictor.model], batch)
    ]
    assert [predictor(row) for row in range(len(dataset))] == together
    assert predictor.predict(range(len(dataset))) == together
    assert any(together)


@pytest.mark.parametrize(
    ("arch", "options", "generation"),
    [("narvl_nano", {"num_queries": 8}, {}), ("ofa_nano", {}, {"beam": 3, "max_len_b": 6})],
)
def test_stages_sum_up_to_the_whole(
    make_predictor: Callable[..., Predictor],
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    options: dict[str, Any],
    generation: dict[str, Any],
) -> None:
    """By a clock that counts how often it is read: each stage then lasts one tick, and one for each of those in it."""
    ticks = iter(range(1000))
    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 1000))
    predictor = make_predictor(arch, generation, **options)
    encoder, decoder = predictor.model.encoder, predictor.model.decoder
    calls: list[object] = []
    decoder.layers[0].register_forward_hook(lambda *_: calls.append(decoder))
    found = stages.stages(predictor, 0)
    steps = len(calls)
    assert steps == 1 if arch == "narvl_nano" else steps > 1
    # The encoder's time holds the trunk's two readings of the clock, the search's those of encoder and decoder.
    assert found == pytest.approx(
        {"picture": 1, "trunk": 1, "encoder": 2, "decoder": steps, "search": 2 + steps, "text": 1}
    )
    assert set(found) == set(stages.STAGES)
    assert not {"forward", "forward_intermediates"} & {*vars(encoder), *vars(decoder), *vars(encoder.embed_images)}


def read_four(student: Predictor) -> list[QueryView]:
    """Read the queries of the first four rows; the images shown are red."""
    return view_queries(student, range(4), [Image.new("RGB", (40, 30), "red")] * 4)


def test_queries_spell_the_caption(make_predictor: Callable[..., Predictor]) -> None:
    student = make_predictor("narvl_nano", num_queries=8)
    for row, reading in enumerate(read_four(student)):
        assert len(reading.slots) == 8
        assert all(0 < slot.probability <= 1 for slot in reading.slots)
        said = [slot.text for slot in reading.slots if slot.kind == "token"]
        assert "".join(said) == student(row).replace(" ", "")
        assert [look.text for look in reading.looks] == said
        assert reading.nbest[0][0] == student(row)
        assert len({text for text, _ in reading.nbest}) == 3


def test_a_beam_search_finds_what_the_most_probable_path_leaves_out(make_predictor: Callable[..., Predictor]) -> None:
    made = make_predictor("narvl_nano", num_queries=8)
    made.task.cfg.eval_args = '{"beam": 1}'
    student = Predictor(made.model, made.task, {}, torch.device("cpu"))
    assert len(student.hypotheses(student.batch(0))) == 1
    for row, reading in enumerate(read_four(student)):
        assert reading.nbest[0][0] == student(row)
        assert len({text for text, _ in reading.nbest}) == 3
        assert all(0 < sure < 1 for _, sure in reading.nbest)


def test_queries_spell_an_answer_of_the_list(
    write_tsv: Callable[..., Path], snli_ve_rows: list[list[str]], answer_vocabulary: Path
) -> None:
    teacher = entailment_teacher(write_tsv("test.tsv", snli_ve_rows), answer_vocabulary)
    labels = len(teacher.task.target_dictionary) + 1
    model = build("narvl_nano", vocab_size=labels, num_queries=6, **SMALL).eval()  # untrained: says anything
    student = Predictor(model, teacher.task, {}, torch.device("cpu"))
    for row, reading in enumerate(read_four(student)):
        assert len(reading.slots) == 6
        said = "".join(slot.text for slot in reading.slots if slot.kind == "token")
        assert said == student(row)
        assert {text for text, _ in reading.nbest} == {"yes", "no", "maybe"}
        assert sum(sure for _, sure in reading.nbest) == pytest.approx(1)


def test_teacher_has_no_queries(make_predictor: Callable[..., Predictor]) -> None:
    with pytest.raises(ValueError, match="OfaModel has no queries"):
        read_four(make_predictor("ofa_nano"))


@pytest.mark.parametrize("queries", [2, 8])
def test_looks_are_what_the_layers_attend_to(make_predictor: Callable[..., Predictor], queries: int) -> None:
    """The weights times the values are what the layers add, so that they are those of the attention itself."""
    student = make_predictor("narvl_nano", num_queries=queries)
    added: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []

    def compare(attention: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        _, values = attention.project_keys(arguments[1])
        heads = attention.weights(*arguments) @ values * attention.c_attn[:, None, None]
        added.append(output)
        expected.append(attention.out_proj(heads.transpose(1, 2).flatten(2)))

    for layer in student.model.decoder.layers:
        layer.encoder_attn.register_forward_hook(compare)
    with torch.inference_mode(), cross_attention(student.model.decoder) as layers:
        student.model(**student.batch(0)["net_input"])
    assert len(layers) == len(added) == len(student.model.decoder.layers)
    torch.testing.assert_close(added, expected)
    for weights in layers:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))


def test_a_token_looks_where_its_queries_do(
    make_predictor: Callable[..., Predictor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if every token were said by query 2, three times as probably as by query 5."""
    student = make_predictor("narvl_nano", num_queries=8)
    shares = torch.tensor([0.0, 0.0, 0.9, 0.0, 0.0, 0.3, 0.0, 0.0])
    heats: list[torch.Tensor] = []
    monkeypatch.setattr(attention, "token_posteriors", lambda _, answer, *__, **___: shares.expand(*answer.shape, 8))
    monkeypatch.setattr(readings, "heat_map", lambda heat: heats.append(heat) or "")
    view_queries(student, [0], [Image.new("RGB", (8, 8))])
    net_input = student.batch(0)["net_input"]
    with torch.inference_mode(), cross_attention(student.model.decoder) as layers:
        student.model(**net_input)
    patches = layers[0].size(3) - net_input["src_tokens"].size(1)
    mean = torch.stack(layers).mean((0, 2))[0, :, :patches]
    for heat in heats:
        torch.testing.assert_close(heat, 0.75 * mean[2] + 0.25 * mean[5])
    assert heats


def entailment_teacher(data: Path, vocabulary: Path, **options: Any) -> Predictor:
    """Make a predictor with a small random teacher of entailment."""
    config = SnliVeConfig(data=str(data), bpe_dir=str(vocabulary), patch_image_size=32, num_bins=10, **options)
    task = SnliVeTask.setup_task(config)
    task.load_dataset("test")
    torch.manual_seed(0)
    model = build("ofa_nano", vocab_size=len(task.target_dictionary), **SMALL).eval()
    return Predictor(model, task, {}, torch.device("cpu"))


def test_teachers_of_answers_are_timed_in_all_ways(
    write_tsv: Callable[..., Path], snli_ve_rows: list[list[str]], answer_vocabulary: Path
) -> None:
    teacher = entailment_teacher(write_tsv("test.tsv", snli_ve_rows), answer_vocabulary)
    searches = teacher.task.teacher_searches()
    assert list(searches) == ["teacher_allcand", "teacher_beam5", "teacher_greedy"]
    asked = {name: teacher.with_options(way.task_options, **way.generation) for name, way in searches.items()}
    assert isinstance(asked["teacher_allcand"].generator, CandidateGenerator)
    assert isinstance(asked["teacher_beam5"].generator, TrieSequenceGenerator)
    assert asked["teacher_greedy"].generator.beam_size == 1
    # With a beam as wide as the list both find the best of the three answers, which are said without a prompt.
    answers = [[predictor(row) for row in range(4)] for predictor in asked.values()]
    assert answers[0] == answers[1]
    assert set(answers[0] + answers[2]) <= {"yes", "no", "maybe"}
    assert str(teacher.task.cfg.val_inference_type) == "allcand"  # as it was


def test_ways_to_ask_that_a_task_does_not_have_are_not_timed(vocabulary: Path, answer_vocabulary: Path) -> None:
    files = {"data": "gone.tsv", "bpe_dir": str(vocabulary), "num_bins": 10}
    without_list = VqaGenTask.setup_task(VqaGenConfig(**files))
    assert list(without_list.teacher_searches()) == ["teacher_beam5", "teacher_greedy"]
    assert list(without_list.student_searches()) == ["student_greedy", "student_beam5"]
    from_source = SnliVeTask.setup_task(SnliVeConfig(**files | {"bpe_dir": str(answer_vocabulary)}, prompt_type="src"))
    assert list(from_source.teacher_searches()) == ["teacher_allcand"]
    assert list(from_source.student_searches()) == ["student_greedy", "student_beam5", "student_allcand"]
    boxes = RefcocoTask.setup_task(RefcocoConfig(**files))
    assert list(boxes.teacher_searches()) == ["teacher_beam5", "teacher_greedy"]
    assert list(boxes.student_searches()) == ["student_greedy", "student_beam5"]


def test_a_checkpoint_generates_as_it_was_validated(
    write_tsv: Callable[..., Path], snli_ve_rows: list[list[str]], answer_vocabulary: Path
) -> None:
    data = write_tsv("test.tsv", snli_ve_rows)
    teacher = entailment_teacher(data, answer_vocabulary, eval_args='{"beam": 2, "unnormalized": true}')
    assert teacher.generation == {"beam": 2, "unnormalized": True}
    assert teacher.with_options({}, beam=1).generation == {"beam": 1, "unnormalized": True}


def test_latency_refuses_models_of_two_tasks(
    pair: dict[str, Path],
    write_checkpoint: Callable[..., Path],
    write_tsv: Callable[..., Path],
    refcoco_rows: Rows,
    vocabulary: Path,
    tmp_path: Path,
) -> None:
    sizes = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32, "max_image_size": 32}
    pair["teacher"] = write_checkpoint("boxes.pt", "ofa", "refcoco", **sizes)
    pair["data"] = write_tsv("boxes.tsv", refcoco_rows)
    with pytest.raises(InputError, match=r"boxes.pt was trained for refcoco, .*student.pt for caption"):
        latency(tmp_path / "l.json", **pair)
