"""One student for several tasks: order of batches, queries, what is logged, fairseq's own programs."""

import json
import logging
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from omegaconf import DictConfig, OmegaConf

from criterions import QueryCtcCriterion
from criterions.expected_score import score_losses
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.models.config import SIZES
from narvl_plugin.models.registered import RegisteredNarvlConfig as NarvlConfig
from narvl_plugin.tasks import loading
from narvl_plugin.tasks.registered import MultitaskConfig, MultitaskTask

Rows = list[list[str]]
PLUGIN = Path(__file__).parents[2] / "narvl_plugin"
MEMBERS = ("caption", "vqa_gen", "gqa", "refcoco", "snli_ve")
LAYOUT = "caption:20,vqa_gen:6,gqa:5,refcoco:7,snli_ve:6"


@pytest.fixture
def mixture(
    write_tsv: Callable[..., Path],
    tmp_path: Path,
    caption_rows: Rows,
    vqa_rows: Rows,
    refcoco_rows: Rows,
    snli_ve_rows: Rows,
) -> Path:
    """Write a file of five members, two of them of one task, with their data."""
    rows = {
        "caption": caption_rows,  # 6 rows
        "vqa_gen": vqa_rows,  # 4
        "gqa": [["g" + row[0], *row[1:]] for row in vqa_rows],  # 4, of which one pass and a half are drawn
        "refcoco": refcoco_rows,  # 3
        "snli_ve": snli_ve_rows,  # 4
    }
    options: dict[str, dict[str, Any]] = {
        "caption": {"num_queries": 20, "eval_cider": True},
        "vqa_gen": {"num_queries": 6, "eval_acc": True, "val_inference_type": "beamsearch"},
        "gqa": {
            "task": "vqa_gen",
            "num_queries": 5,
            "weight": 1.5,
            "eval_acc": True,
            "val_inference_type": "beamsearch",
        },
        "refcoco": {"num_queries": 7, "max_image_size": 80, "eval_acc": True},
        "snli_ve": {"num_queries": 6},
    }
    for name, values in options.items():
        files = [write_tsv(f"{name}_{split}.tsv", rows[name]) for split in ("train", "valid")]
        values |= {"data": ",".join(map(str, files)), "patch_image_size": 32}
    (tmp_path / "mixture.yaml").write_text(json.dumps(options))  # JSON is YAML
    return tmp_path / "mixture.yaml"


@pytest.fixture
def task(mixture: Path, answer_vocabulary: Path) -> MultitaskTask:
    """Give the task."""
    return MultitaskTask.setup_task(MultitaskConfig(data=str(mixture), bpe_dir=str(answer_vocabulary), num_bins=11))


def epoch_of(task: MultitaskTask, epoch: int, split: str = "train", **options: Any) -> Any:
    task.load_dataset(split, epoch=epoch)
    return task.get_batch_iterator(task.dataset(split), max_sentences=2, seed=1, epoch=epoch, **options)


def batches_of(task: MultitaskTask, epoch: int, split: str = "train", **options: Any) -> list[tuple[str, list[str]]]:
    """Return member and ids of each batch of an epoch, as fairseq's trainer would meet them."""
    batches = epoch_of(task, epoch, split, **options).next_epoch_itr(shuffle=split == "train")
    return [(batch["member"], batch["id"].tolist()) for batch in batches if batch]


@pytest.mark.parametrize("limit", [{"max_tokens": 500, "max_sentences": None}, {"max_sentences": 0}])
def test_limits_without_room_for_a_row_are_an_error(task: MultitaskTask, limit: dict[str, int | None]) -> None:
    task.load_dataset("train")
    with pytest.raises(InputError, match=r"--(max-tokens 500: each row counts 1000|batch-size 0: a batch needs 1 row)"):
        task.get_batch_iterator(task.dataset("train"), **limit)


class TestOrder:
    def test_an_epoch_reads_members_by_weight_and_in_turns(self, task: MultitaskTask) -> None:
        batches = batches_of(task, 1)
        rows = Counter({name: 0 for name in MEMBERS})
        for name, ids in batches:
            rows[name] += len(ids)
        assert rows == {"caption": 6, "vqa_gen": 4, "gqa": 6, "refcoco": 3, "snli_ve": 4}
        # Whether or not fairseq shuffles the batches, too, it is not one member after another.
        unshuffled = [batch["member"] for batch in epoch_of(task, 1).next_epoch_itr(shuffle=False)]
        for order in ([name for name, _ in batches], unshuffled):
            changes = sum(one != other for one, other in zip(order, order[1:], strict=False))
            assert changes > len(MEMBERS) - 1

    def test_it_depends_on_seed_and_epoch_alone(self, task: MultitaskTask) -> None:
        first, second = batches_of(task, 1), batches_of(task, 2)
        assert batches_of(task, 1) == first != second
        assert batches_of(task, 1, num_workers=2, data_buffer_size=10) == first

    def test_processes_share_it(self, task: MultitaskTask) -> None:
        whole = batches_of(task, 1)
        shares = [batches_of(task, 1, num_shards=2, shard_id=rank) for rank in (0, 1)]
        assert [shares[number % 2][number // 2] for number in range(len(whole))] == whole

    def test_a_stopped_epoch_goes_on_where_it_was(self, task: MultitaskTask) -> None:
        whole = batches_of(task, 3)
        iterator = epoch_of(task, 3)
        batches = iterator.next_epoch_itr()
        for _ in range(4):
            next(batches)
        state = iterator.state_dict()
        resumed = epoch_of(task, state["epoch"])
        resumed.load_state_dict(state)
        rest = [(batch["member"], batch["id"].tolist()) for batch in resumed.next_epoch_itr()]
        assert rest == whole[4:]

    def test_validation_reads_each_row_once(self, task: MultitaskTask) -> None:
        ids = [f"{name}:{row}" for name, rows in batches_of(task, 1, "valid") for row in rows]
        assert len(ids) == len(set(ids)) == 6 + 4 + 4 + 3 + 4

    def test_training_files_of_each_member_take_turns(
        self, mixture: Path, answer_vocabulary: Path, write_tsv: Callable[..., Path], caption_rows: Rows
    ) -> None:
        second = write_tsv("second.tsv", [["second", *row[1:]] for row in caption_rows])
        described = json.loads(mixture.read_text())
        first, valid = described["caption"]["data"].split(",")
        described["caption"]["data"] = f"{first},{second},{valid}"
        mixture.write_text(json.dumps(described))
        task = MultitaskTask.setup_task(MultitaskConfig(data=str(mixture), bpe_dir=str(answer_vocabulary), num_bins=11))
        assert task.has_sharded_data("train") and not task.has_sharded_data("valid")
        for epoch, expected in ((1, False), (2, True), (3, False)):
            ids = {row for name, rows in batches_of(task, epoch) if name == "caption" for row in rows}
            assert (ids == {"second"}) is expected


def student_config() -> DictConfig:
    """Return the model's part of a configuration, as fairseq hands it to tasks."""
    return OmegaConf.create({"model": OmegaConf.structured(NarvlConfig(_name="narvl", **SIZES["nano"]))}).model


class TestModels:
    def test_a_student_gets_the_queries_of_all_members(self, task: MultitaskTask) -> None:
        config = student_config()
        model = task.build_model(config)
        assert (config.num_queries, config.member_queries) == (44, LAYOUT)
        assert model.decoder.query_embed.weight.shape[0] == 44
        assert model.members["refcoco"] == slice(31, 38)

    def test_another_ones_checkpoint_is_refused(self, task: MultitaskTask) -> None:
        config = student_config()
        config.num_queries, config.member_queries = 20, "caption:20"
        with pytest.raises(InputError, match=f"queries {LAYOUT}, but the student was trained with caption:20"):
            task.build_model(config, from_checkpoint=True)

    def test_options_that_the_model_rules_out_are_refused(self, mixture: Path, answer_vocabulary: Path) -> None:
        described = json.loads(mixture.read_text())
        described["gqa"]["prompt_type"] = "src"
        mixture.write_text(json.dumps(described))
        task = MultitaskTask.setup_task(MultitaskConfig(data=str(mixture), bpe_dir=str(answer_vocabulary)))
        with pytest.raises(InputError, match="mixture.yaml: member gqa: --prompt-type src is for teachers"):
            task.build_model(student_config())

    def test_what_a_member_refuses_is_said_with_its_name(self, mixture: Path, answer_vocabulary: Path) -> None:
        described = json.loads(mixture.read_text())
        described["refcoco"]["max_image_size"] = 16
        mixture.write_text(json.dumps(described))
        with pytest.raises(InputError, match="mixture.yaml: member refcoco: --patch-image-size 32 is larger"):
            MultitaskTask.setup_task(MultitaskConfig(data=str(mixture), bpe_dir=str(answer_vocabulary)))

    def test_generation_is_the_single_tasks(self, task: MultitaskTask) -> None:
        with pytest.raises(InputError, match="take --task caption or --task vqa_gen or --task vqa_gen --member gqa or"):
            task.build_generator([], None)

    def test_targets_are_measured_by_each_members_queries(
        self, task: MultitaskTask, caplog: pytest.LogCaptureFixture
    ) -> None:
        task.load_dataset("train")
        model = torch.nn.Module()
        model.num_queries, model.is_student = 44, True
        with caplog.at_level(logging.INFO):
            task.begin_epoch(1, model)
            task.begin_epoch(2, model)
        told = [record.getMessage() for record in caplog.records if "do not fit" in record.getMessage()]
        counts = [
            re.search(r"(\w+)_train.tsv: \d of (\d) targets do not fit the model's (\d+) queries", line)
            for line in told
        ]
        assert [found.groups() for found in counts] == [
            *(("caption", "6", "20"), ("vqa_gen", "4", "6"), ("gqa", "4", "5"), ("refcoco", "3", "7")),
            ("snli_ve", "4", "6"),
        ]


class Criterion:
    """Gives each sample a loss of two nats, and remembers whose queries were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, model: torch.nn.Module, sample: dict[str, Any]) -> tuple[torch.Tensor, int, dict[str, Any]]:
        size = len(sample["id"])
        self.asked.append((sample["member"], sample["net_input"].get("queries")))
        loss = torch.tensor(2.0 * size)
        return loss, size, {"loss": loss, "sample_size": size, "ntokens": size, "nsentences": size}

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        metrics.log_scalar("loss", 0.0)


class Silent:
    """A generator that says nothing."""

    def generate(self, models: object, sample: dict[str, Any], **options: object) -> list[Any]:
        return [[{"tokens": torch.tensor([2]), "positional_scores": torch.zeros(1)}] for _ in sample["id"]]


class TestLogging:
    @pytest.fixture
    def model(self) -> torch.nn.Module:
        """Give what looks like a student."""
        model = torch.nn.Module()
        model.num_queries, model.is_student = 44, True
        return model

    def validate(self, task: MultitaskTask, model: torch.nn.Module) -> tuple[Criterion, list[dict[str, Any]]]:
        criterion = Criterion()
        for member in task.tasks.values():
            member.generator = Silent()
        iterator = epoch_of(task, 1, "valid").next_epoch_itr(shuffle=False)
        return criterion, [task.valid_step(batch, model, criterion)[2] for batch in iterator]

    def test_batches_go_to_their_members_queries(self, task: MultitaskTask, model: torch.nn.Module) -> None:
        criterion, _ = self.validate(task, model)
        assert {member for member, _ in criterion.asked} == set(MEMBERS)
        assert all(member == queries for member, queries in criterion.asked)

    def test_teachers_are_not_told_of_queries(self, task: MultitaskTask) -> None:
        criterion, _ = self.validate(task, torch.nn.Module())
        assert {queries for _, queries in criterion.asked} == {None}

    def test_every_step_logs_the_same_things(self, task: MultitaskTask, model: torch.nn.Module) -> None:
        """All processes' figures are added up by their places, whichever member each has."""
        _, logged = self.validate(task, model)
        keys = [[(key, torch.is_tensor(value)) for key, value in log.items()] for log in logged]
        assert len(keys) == 11 and all(other == keys[0] for other in keys)

    def test_members_have_losses_and_scores_of_their_own(
        self, task: MultitaskTask, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            task.tasks["gqa"], "validation_scores", lambda sample, said: {"vqa_score": [0.5] * len(sample["id"])}
        )
        criterion, logged = self.validate(task, model)
        with metrics.aggregate(new_root=True) as aggregator:
            task.reduce_metrics(logged, criterion)
        values = aggregator.get_smoothed_values()
        assert values["gqa_vqa_score"] == 0.5
        assert values["vqa_gen_vqa_score"] == values["refcoco_score"] == values["caption_cider"] == 0
        assert values["refcoco_no_box"] == 1
        assert "snli_ve_snli_score" not in values  # not asked for
        for name in MEMBERS:
            assert values[f"{name}_loss"] == pytest.approx(2.885, abs=1e-3)  # two nats in bits


class ScoreCriterion(Criterion):
    """Remembers how much the scores of drawn outputs lack, by member."""

    def __init__(self, task: MultitaskTask) -> None:
        super().__init__()
        self.task = task
        self.lacks: dict[str, float] = {}

    def __call__(self, model: torch.nn.Module, sample: dict[str, Any]) -> tuple[torch.Tensor, int, dict[str, Any]]:
        target = sample["target"]
        blank = len(self.task.target_dictionary)
        logits = torch.zeros(len(target), target.size(1), blank + 1)
        logits.scatter_(2, target[:, :, None], 100.0)  # draws the target, with its final </s>
        lengths = target.ne(self.task.target_dictionary.pad()).sum(1, keepdim=True)
        losses = score_losses(self.task, logits, target[:, None], lengths, blank=blank)
        self.lacks[sample["member"]] = float(losses.mean())
        return super().__call__(model, sample)


class TestScores:
    def test_a_batch_is_scored_by_its_member_if_that_has_scores(self, task: MultitaskTask) -> None:
        assert task.scores_outputs
        epoch_of(task, 1)  # the training captions score those of a batch
        criterion, student = ScoreCriterion(task), torch.nn.Module()
        student.is_student = True
        for member in task.tasks.values():
            member.generator = Silent()
        for batch in epoch_of(task, 1, "valid").next_epoch_itr(shuffle=False):
            task.valid_step(batch, student, criterion)
        assert criterion.lacks["vqa_gen"] == criterion.lacks["gqa"] == criterion.lacks["snli_ve"] == 0
        assert criterion.lacks["refcoco"] == 1  # a box has four tokens, and no </s>
        assert 0 < criterion.lacks["caption"] < 1

    def test_a_mixture_without_any_scores_is_refused(self, mixture: Path, answer_vocabulary: Path) -> None:
        members = json.loads(mixture.read_text())
        mixture.write_text(json.dumps({"gqa": members["gqa"], "snli_ve": members["snli_ve"]}))
        task = MultitaskTask.setup_task(MultitaskConfig(data=str(mixture), bpe_dir=str(answer_vocabulary), num_bins=11))
        with pytest.raises(InputError, match="^--score-weight: the task vqa_gen, snli_ve has no score of outputs"):
            QueryCtcCriterion(task, False, False, 0.0, score_weight=10)


def arguments(mixture: Path, vocabulary: Path, *more: object) -> list[object]:
    return [
        *(mixture, "--task", "multitask", "--bpe-dir", vocabulary, "--num-bins", 11, "--cpu", "--batch-size", 2),
        *("--optimizer", "adam", "--lr", 1e-4, "--num-workers", 0, "--no-progress-bar", *more),
    ]


def generated(
    run_generate: Callable[..., None], mixture: Path, vocabulary: Path, member: str, checkpoint: Path, *more: object
) -> list[str]:
    """Answer a member's validation file with a checkpoint, and return the lines written."""
    out = mixture.parent / "generated"
    run_generate(
        *(mixture.parent / f"{member}_valid.tsv", "--bpe-dir", vocabulary, "--num-bins", 11, "--patch-image-size", 32),
        *("--path", checkpoint, "--cpu", "--results-path", out, *more),
    )
    return (out / "generate-test.txt").read_text().splitlines()


@pytest.mark.integration
@pytest.mark.usefixtures("no_java")
def test_from_a_mixture_to_each_members_answers(
    run_train: Callable[..., None],
    run_generate: Callable[..., None],
    mixture: Path,
    answer_vocabulary: Path,
    tmp_path: Path,
) -> None:
    teacher = arguments(mixture, answer_vocabulary, "--save-dir", tmp_path / "teacher", "--max-epoch", 1)
    run_train(*teacher, "--arch", "ofa_nano", "--criterion", "adjust_label_smoothed_cross_entropy")
    training = arguments(
        *(
            mixture,
            answer_vocabulary,
            "--arch",
            "narvl_nano",
            "--criterion",
            "qctc",
            "--save-dir",
            tmp_path / "student",
        ),
        *("--finetune-from-model", tmp_path / "teacher" / "checkpoint_last.pt"),
        *("--best-checkpoint-metric", "refcoco_score", "--maximize-best-checkpoint-metric"),
    )
    run_train(*training, "--max-update", 5)  # stops in the middle of an epoch
    run_train(*training, "--max-epoch", 2)
    checkpoint = tmp_path / "student" / "checkpoint_best.pt"
    state = read_checkpoint(checkpoint)
    assert state["cfg"]["model"]["member_queries"] == LAYOUT
    assert state["extra_state"]["best"] >= 0
    steps = sum(len(range(0, rows, 2)) for rows in (6, 4, 6, 3, 4))
    assert (
        read_checkpoint(tmp_path / "student" / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"]
        == 2 * steps
    )

    for member, options, score in (
        ("caption", ["--task", "caption", "--scoring", "coco_caption"], "6 captions"),
        ("vqa_gen", ["--task", "vqa_gen", "--scoring", "vqa"], "4 questions"),
        ("gqa", ["--task", "vqa_gen", "--member", "gqa", "--scoring", "vqa"], "4 questions"),
        ("refcoco", ["--task", "refcoco", "--max-image-size", 80, "--scoring", "grounding"], "3 boxes"),
        ("snli_ve", ["--task", "snli_ve", "--scoring", "entailment"], "4 rows"),
    ):
        lines = generated(run_generate, mixture, answer_vocabulary, member, checkpoint, *options)
        assert score in lines[-1]

    # A student of one member alone answers as the whole one does.
    convert(checkpoint, tmp_path / "gqa.pt", member="gqa")
    alone = read_checkpoint(tmp_path / "gqa.pt")
    assert torch.equal(
        alone["model"]["decoder.query_embed.weight"], state["model"]["decoder.query_embed.weight"][26:31]
    )
    assert (alone["cfg"]["model"]["num_queries"], alone["cfg"]["model"]["member_queries"]) == (5, "")
    options = ["--task", "vqa_gen", "--scoring", "vqa", "--print-alignment", "hard"]
    ours = generated(run_generate, mixture, answer_vocabulary, "gqa", tmp_path / "gqa.pt", *options)
    assert ours == generated(run_generate, mixture, answer_vocabulary, "gqa", checkpoint, *options, "--member", "gqa")
    with pytest.raises(InputError, match=f"--member gqa2: its members are {', '.join(MEMBERS)}"):
        convert(checkpoint, tmp_path / "none.pt", member="gqa2")
    with pytest.raises(InputError, match="--member gqa: is no student of a mixture"):
        convert(tmp_path / "gqa.pt", tmp_path / "none.pt", member="gqa")

    # Read back from Python, the single task has the options of its member.
    loaded = loading.load(checkpoint, task_overrides={"member": "gqa"})
    assert (loaded.task.cfg._name, loaded.task.cfg.patch_image_size) == ("vqa_gen", 32)
    assert loaded.models[0].num_queries == 5
    assert loading.load(tmp_path / "teacher" / "checkpoint_last.pt").task.cfg.patch_image_size == 32


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_processes_with_batches_of_different_members_train_one_model(
    backend: str, task: MultitaskTask, mixture: Path, answer_vocabulary: Path, programs: Path, tmp_path: Path
) -> None:
    """Two processes with a batch each do what one does that sums up the gradients of both."""
    order = [member for member, _ in batches_of(task, 1)]
    assert any(one != other for one, other in zip(order[:6:2], order[1:6:2], strict=True))
    plain = ["--arch", "narvl_nano", "--dropout", 0, "--criterion", "qctc", "--max-update", 3, "--seed", 1]
    plain += ["--optimizer", "sgd"]  # Adam would turn rounding errors of the smallest gradients into whole steps

    def start(name: str, *more: object) -> subprocess.Popen[str]:
        words = arguments(mixture, answer_vocabulary, *plain, "--save-dir", tmp_path / name, *more)
        return subprocess.Popen(
            [programs / "fairseq-train", *map(str, words), "--user-dir", str(PLUGIN)],
            env={**os.environ, "PYTHONPATH": str(PLUGIN.parent)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    distributed = [
        *("--distributed-backend", "gloo", "--ddp-backend", backend, "--distributed-no-spawn"),
        *("--distributed-world-size", 2, "--distributed-init-method", f"file://{tmp_path / 'rendezvous'}"),
    ]
    both = [start("two", *distributed, "--distributed-rank", rank) for rank in (0, 1)]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    process = start("one", "--update-freq", 2)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    one, two = (read_checkpoint(tmp_path / name / "checkpoint_last.pt") for name in ("one", "two"))
    assert {"decoder.query_embed.weight", "encoder.image_proj.weight"} <= one["model"].keys()
    for name, expected in one["model"].items():
        if expected.is_floating_point() and "running" not in name:  # but for what batch norm counts, each by itself
            torch.testing.assert_close(two["model"][name], expected, atol=1e-6, rtol=1e-4)
    lines = [re.search(r"\| valid \| .*", text)[0] for text in (output, outputs[0])]
    names = [set(re.findall(rf"(?:{'|'.join(MEMBERS)})_\w+", line)) for line in lines]
    assert names[0] == names[1] and {"caption_cider", "gqa_vqa_score", "refcoco_score", "snli_ve_loss"} <= names[0]
