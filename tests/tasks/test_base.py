"""What all tasks share: which file a split reads, batches of an epoch, generators, validation's target."""

import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.logging import metrics
from fairseq.sequence_generator import SequenceGenerator

from narvl_plugin.ctc import LengthRange
from narvl_plugin.data import survey
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.models.registered import build
from narvl_plugin.tasks.registered import CaptionConfig, CaptionTask

Rows = list[list[str]]


@pytest.fixture
def make_task(vocabulary: Path) -> Callable[..., CaptionTask]:
    """Make a task on some TSV files."""

    def make(*paths: Path | str, **options: Any) -> CaptionTask:
        data = ",".join(str(path) for path in paths)
        values = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 8} | options
        return CaptionTask.setup_task(CaptionConfig(data=data, **values))

    return make


def ids_of_epoch(task: CaptionTask, epoch: int, split: str = "train", **options: Any) -> list[list[str]]:
    """Return the ids of each batch, as fairseq's trainer would meet them."""
    task.load_dataset(split, epoch=epoch)
    iterator = task.get_batch_iterator(task.dataset(split), seed=1, epoch=epoch, **options)
    return [batch["id"].tolist() if batch else [] for batch in iterator.next_epoch_itr(shuffle=split == "train")]


class TestSplits:
    def test_training_files_take_turns(
        self,
        make_task: Callable[..., CaptionTask],
        write_tsv: Callable[..., Path],
        caption_rows: Rows,
    ) -> None:
        paths = [write_tsv(f"{name}.tsv", caption_rows) for name in ("one", "two", "three", "valid")]
        task = make_task(*paths)
        read = []
        for epoch in (1, 2, 3, 4, 5):
            task.load_dataset("train", epoch=epoch)
            read.append(Path(task.dataset("train").tsv.path).stem)
        assert read == ["one", "two", "three", "one", "two"]
        assert task.has_sharded_data("train")
        for split in ("valid", "test"):
            assert task.split_path(split, 2) == str(paths[-1])
            assert not task.has_sharded_data(split)

    def test_a_single_file_serves_generation(
        self, make_task: Callable[..., CaptionTask], write_tsv: Callable[..., Path], caption_rows: Rows
    ) -> None:
        task = make_task(write_tsv("only.tsv", caption_rows))
        for split in ("test", "train"):
            task.load_dataset(split)
            assert len(task.dataset(split)) == 6
        assert not task.has_sharded_data("train")

    def test_training_and_validation_on_one_file_is_an_error(
        self, make_task: Callable[..., CaptionTask], write_tsv: Callable[..., Path], caption_rows: Rows
    ) -> None:
        task = make_task(write_tsv("only.tsv", caption_rows))
        task.load_dataset("valid")
        with pytest.raises(InputError, match=r"only\.tsv: names one file for training and validation"):
            task.load_dataset("train")

    def test_a_file_of_a_later_epoch_is_missed_at_once(
        self, make_task: Callable[..., CaptionTask], write_tsv: Callable[..., Path], caption_rows: Rows
    ) -> None:
        there = write_tsv("there.tsv", caption_rows)
        task = make_task(there, "nowhere.tsv", there)
        with pytest.raises(MissingInput, match=r"^nowhere\.tsv: no such TSV file \(split 'train'"):
            task.load_dataset("train", epoch=1)

    def test_unknown_splits_are_an_error(self, make_task: Callable[..., CaptionTask]) -> None:
        with pytest.raises(InputError, match="no split 'dev'; choose one of train, valid, test"):
            make_task("a.tsv").load_dataset("dev")

    def test_a_missing_vocabulary_is_named(self, make_task: Callable[..., CaptionTask], tmp_path: Path) -> None:
        with pytest.raises(MissingInput, match="--bpe-dir .*nowhere: no spm.model"):
            make_task("a.tsv", bpe_dir=str(tmp_path / "nowhere"))


class TestBatches:
    @pytest.fixture
    def task(
        self,
        make_task: Callable[..., CaptionTask],
        write_tsv: Callable[..., Path],
        caption_rows: Rows,
    ) -> CaptionTask:
        """Make a task with 20 rows to train on and 20 to evaluate on."""
        rows = [[str(number), *caption_rows[number % 6][1:]] for number in range(20)]
        return make_task(write_tsv("train.tsv", rows), write_tsv("valid.tsv", rows))

    def test_no_row_is_dropped(self, task: CaptionTask) -> None:
        # fairseq's default multiple of 8 would leave 16 of them
        batches = ids_of_epoch(task, 1, "test", max_sentences=16, required_batch_size_multiple=8)
        assert [len(batch) for batch in batches] == [16, 4]
        assert sum(batches, []) == [str(number) for number in range(20)]

    def test_rows_are_shuffled_anew_for_every_epoch(self, task: CaptionTask) -> None:
        epochs = [ids_of_epoch(task, epoch, max_sentences=4) for epoch in (1, 2)]
        for batches in epochs:
            assert sorted(sum(batches, []), key=int) == [str(number) for number in range(20)]
        first, second = ({frozenset(batch) for batch in batches} for batches in epochs)
        assert first != second  # not only the order of the same batches
        assert ids_of_epoch(task, 2, max_sentences=4) == epochs[1]

    def test_fairseq_asks_for_new_batches_every_epoch(self, task: CaptionTask) -> None:
        task.load_dataset("train")
        task.load_dataset("valid")
        assert not task.can_reuse_epoch_itr(task.dataset("train"))
        assert task.can_reuse_epoch_itr(task.dataset("valid"))

    def test_workers_give_the_same_batches(self, task: CaptionTask) -> None:
        alone = ids_of_epoch(task, 1, max_sentences=3)
        assert ids_of_epoch(task, 1, max_sentences=3, num_workers=2, data_buffer_size=10) == alone

    def test_workers_end_with_their_epoch(self, task: CaptionTask) -> None:
        ids_of_epoch(task, 1, num_workers=2, data_buffer_size=10, max_sentences=3)
        ended = time.monotonic() + 4  # less than the five seconds after which workers look up by themselves
        while multiprocessing.active_children() and time.monotonic() < ended:
            time.sleep(0.05)
        assert multiprocessing.active_children() == []

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_an_update_of_several_processes_has_the_rows_of_a_larger_batch(self, task: CaptionTask, ranks: int) -> None:
        shares = [ids_of_epoch(task, 2, max_sentences=3, num_shards=ranks, shard_id=rank) for rank in range(ranks)]
        updates = [sum(batches, []) for batches in zip(*shares, strict=True)]
        assert updates == ids_of_epoch(task, 2, max_sentences=3 * ranks)

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    @pytest.mark.parametrize(("batch_size", "workers"), [(3, 0), (4, 0), (4, 1)])
    def test_processes_share_the_rows(self, task: CaptionTask, ranks: int, batch_size: int, workers: int) -> None:
        options = {"max_sentences": batch_size, "num_workers": workers, "data_buffer_size": 2 * workers}
        shares = [ids_of_epoch(task, 1, num_shards=ranks, shard_id=rank, **options) for rank in range(ranks)]
        assert len({len(share) for share in shares}) == 1
        rows = [name for share in shares for batch in share for name in batch]
        assert sorted(rows, key=int) == [str(number) for number in range(20)]

    @pytest.mark.parametrize("tokens", [999, 1, 0, -5])
    def test_tokens_below_those_of_a_row_are_an_error(self, task: CaptionTask, tokens: int) -> None:
        message = rf"--max-tokens {tokens}: each row counts 1000 tokens, .* give 1000 or more, or .* --batch-size"
        with pytest.raises(InputError, match=message):
            ids_of_epoch(task, 1, "test", max_tokens=tokens)
        assert ids_of_epoch(task, 1, "test", max_tokens=1000) == [[str(number)] for number in range(20)]

    @pytest.mark.parametrize("rows", [0, -2])
    def test_batches_without_rows_are_an_error(self, task: CaptionTask, rows: int) -> None:
        with pytest.raises(InputError, match=f"--batch-size {rows}: a batch needs 1 row or more"):
            ids_of_epoch(task, 1, max_sentences=rows)

    def test_tokens_limit_batches_by_rows(self, task: CaptionTask) -> None:
        assert [len(batch) for batch in ids_of_epoch(task, 1, "test", max_tokens=12_000)] == [12, 8]


class TestGenerators:
    def test_follow_the_kind_of_model(self, make_task: Callable[..., CaptionTask]) -> None:
        task = make_task("a.tsv")
        size = len(task.target_dictionary)
        teacher = build("ofa_nano", vocab_size=size)
        student = build("narvl_nano", vocab_size=size + 1, num_queries=5)
        options = SimpleNamespace(beam=3, max_len_b=7)
        extra = {"lm_model": None, "lm_weight": 0.0}
        search = task.build_generator([teacher], options, extra_gen_cls_kwargs=extra)
        assert isinstance(search, SequenceGenerator)
        assert (search.beam_size, search.max_len_b) == (3, 7)
        assert isinstance(task.build_generator([student], options, extra_gen_cls_kwargs=extra), ParallelGenerator)
        with pytest.raises(InputError, match="an ensemble must be of one kind"):
            task.build_generator([teacher, student], options)

    def test_lengths_and_ngrams_of_a_student(self, make_task: Callable[..., CaptionTask]) -> None:
        task = make_task("a.tsv")
        student = build("narvl_nano", vocab_size=len(task.target_dictionary) + 1, num_queries=5)
        options = SimpleNamespace(beam=1, min_len=2, max_len_a=0, max_len_b=4, no_repeat_ngram_size=3)
        generator = task.build_generator([student], options)
        assert (generator.constraint, generator.no_repeat_ngram) == (LengthRange(2, 4, task.target_dictionary.eos()), 3)
        for wrong in ({"max_len_a": 1.0}, {"min_len": 5}, {"min_len": 0, "max_len_b": 0}):
            with pytest.raises(InputError, match="from --min-len to --max-len-b tokens"):
                task.build_generator([student], SimpleNamespace(**vars(options) | wrong))

    def test_teachers_start_from_the_first_symbol(self, make_task: Callable[..., CaptionTask]) -> None:
        task = make_task("a.tsv")
        asked: dict[str, Any] = {}
        generator = SimpleNamespace(generate=lambda models, sample, **options: asked.update(options))
        task.inference_step(generator, [], {})
        assert asked == {"prefix_tokens": None, "constraints": None, "bos_token": 0}

    @pytest.mark.parametrize(("text", "message"), [("{beam: 5}", "is not JSON"), ("5", "expected a JSON object")])
    def test_options_in_validation_are_json(
        self, make_task: Callable[..., CaptionTask], text: str, message: str
    ) -> None:
        with pytest.raises(InputError, match=f"--eval-args .*{message}"):
            make_task("a.tsv", eval_args=text).generator_options()


class TestTargetsAreMeasured:
    @pytest.fixture
    def task(
        self, make_task: Callable[..., CaptionTask], write_tsv: Callable[..., Path], caption_rows: Rows
    ) -> CaptionTask:
        """Make a task whose rows need 3, 2, 1 and 3 queries, beside one that is of no use."""
        for row, caption in enumerate(("a red hat", "two dogs", "", "cat", "a a")):
            caption_rows[row][2] = caption
        task = make_task(write_tsv("train.tsv", caption_rows[:5]), "valid.tsv", skip_bad_rows=3)
        task.datasets["train"] = task.build_dataset(TsvFile(task.training_paths[0], "0,4,2"), "train")
        return task

    def measure(self, task: CaptionTask, caplog: pytest.LogCaptureFixture, num_queries: int | None) -> list[str]:
        model = torch.nn.Module()
        if num_queries is not None:
            model.num_queries = num_queries
        with caplog.at_level(logging.INFO):
            for epoch in (1, 2):
                task.begin_epoch(epoch, model)
        return [record.getMessage() for record in caplog.records if "do not fit" in record.getMessage()]

    def test_once_before_training(self, task: CaptionTask, caplog: pytest.LogCaptureFixture) -> None:
        (message,) = self.measure(task, caplog, 2)
        assert "train.tsv: 2 of 4 targets do not fit the model's 2 queries; the longest needs 3" in message
        assert caplog.records[-1].levelno == logging.WARNING

    def test_if_all_fit(self, task: CaptionTask, caplog: pytest.LogCaptureFixture) -> None:
        (message,) = self.measure(task, caplog, 3)
        assert "0 of 4 targets do not fit" in message
        assert caplog.records[-1].levelno == logging.INFO

    def test_in_a_sample_of_long_files(
        self, task: CaptionTask, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(survey, "ROWS_LOOKED_AT", 2)
        (message,) = self.measure(task, caplog, 2)
        assert "2 of 2 targets of a sample of 2 of its 5 rows do not fit the model's 2 queries" in message

    def test_not_for_teachers(self, task: CaptionTask, caplog: pytest.LogCaptureFixture) -> None:
        assert self.measure(task, caplog, None) == []


def test_validation_takes_the_loss_on_the_first_reference(
    make_task: Callable[..., CaptionTask], write_tsv: Callable[..., Path], caption_rows: Rows
) -> None:
    caption_rows[0][2] = "a cat&&two dogs run"
    task = make_task("", write_tsv("valid.tsv", caption_rows))
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    batch = dataset.collater([dataset[0], dataset[1]])
    joined = batch["target"].clone()
    seen: list[dict[str, Any]] = []

    def criterion(model: torch.nn.Module, sample: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
        seen.append(sample)
        return 0, 1, {}

    task.valid_step(batch, torch.nn.Module(), criterion)
    sample = seen[0]
    assert [task.codec.decode(row) for row in sample["target"]] == ["a cat", "two dogs run"]
    assert sample["ntokens"] == 7  # two and three words, </s> each
    previous = sample["net_input"]["prev_output_tokens"]
    assert previous[:, 0].tolist() == [0, 0]
    assert torch.equal(previous[1, 1:], sample["target"][1, :-1])
    assert torch.equal(batch["target"], joined)  # what generation reads is left as it was


def test_a_stand_in_counts_nothing(
    make_task: Callable[..., CaptionTask], write_tsv: Callable[..., Path], caption_rows: Rows
) -> None:
    caption_rows[1][4] = "no image"
    task = make_task(write_tsv("train.tsv", caption_rows), write_tsv("valid.tsv", caption_rows), skip_bad_rows=9)
    model = build("ofa_tiny", vocab_size=len(task.target_dictionary), vision_trunk="test_resnet", freeze_resnet=True)
    criterion = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=0.0)
    optimizer = SimpleNamespace(backward=lambda loss: loss.backward())
    for split in ("train", "valid"):
        task.load_dataset(split)
        bad = task.dataset(split).collater([task.dataset(split)[1]])
        good = task.dataset(split).collater([task.dataset(split)[0]])
        for batch, counts in ((bad, False), (good, True)):
            if split == "train":
                model.zero_grad()
                _, size, logged = task.train_step(batch, model, criterion, optimizer, 0)
                assert counts == any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)
            else:
                _, size, logged = task.valid_step(batch, model, criterion)
            assert bool(size) == counts
            assert (logged["nsentences"], bool(logged["loss"])) == (int(counts), counts)
            with metrics.aggregate(new_root=True) as aggregator:
                task.reduce_metrics([logged], criterion)
            assert (aggregator["loss"].avg > 0) == counts


def test_dictionaries_and_text_come_from_the_vocabulary(make_task: Callable[..., CaptionTask]) -> None:
    task = make_task("a.tsv")
    assert task.source_dictionary is task.target_dictionary
    assert task.build_bpe(None).decode(task.codec.encode("two dogs")) == "two dogs"
