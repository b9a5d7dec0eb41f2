"""The caption task: CIDEr in validation, and fairseq's own programs from TSV to text."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.collate import pad_tokens
from narvl_plugin.data.scenes.backgrounds import Background
from narvl_plugin.data.scenes.scene import Group, Scene, Thing, scene_as_json
from narvl_plugin.data.scenes.truth import scenes_file
from narvl_plugin.data.text import train_sentencepiece
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.scoring.sentences import BatchwiseCider
from narvl_plugin.scoring.tokenization import plain_words
from narvl_plugin.scoring.wording import KnownWording
from narvl_plugin.tasks.registered import CaptionConfig, CaptionTask

Rows = list[list[str]]
WORDS = st.lists(st.sampled_from(["a", "red", "cat", "Dog,", "runs"]), min_size=1, max_size=6).map(" ".join)
IMAGES = st.lists(st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)), min_size=2, max_size=7)


def cider(captions: list[str], references: list[list[str]]) -> list[float]:
    """Return the CIDEr of each caption by the COCO tools' own scorer, over all at once."""
    _, scores = Cider().compute_score(
        {row: [plain_words(text) for text in texts] for row, texts in enumerate(references)},
        {row: [plain_words(caption)] for row, caption in enumerate(captions)},
    )
    return [float(score) for score in scores]


@given(IMAGES, st.integers(1, 4))
def test_batches_average_to_the_cider_of_the_whole_set(images: list[tuple[str, list[str]]], size: int) -> None:
    captions, references = (list(column) for column in zip(*images, strict=True))
    batchwise = BatchwiseCider(references)
    scores = []
    for start in range(0, len(captions), size):
        scores += batchwise(captions[start : start + size], references[start : start + size])
    assert scores == pytest.approx(cider(captions, references))


def test_validation_logs_the_cider_of_what_is_generated(
    vocabulary: Path,
    write_tsv: Callable[..., Path],
    caption_rows: Rows,
    validated: Callable[..., dict[str, float]],
) -> None:
    path = write_tsv("valid.tsv", caption_rows)
    config = CaptionConfig(
        data=f"{path},{path}", bpe_dir=str(vocabulary), patch_image_size=8, num_bins=10, eval_cider=True
    )
    said = ["a red square on a wall", "two cats run", "hat", "a cat", "a boat and a bird", "one"]
    logged = validated(CaptionTask.setup_task(config), said, batch_size=4)
    expected = cider(said, [[row[2]] for row in caption_rows])
    assert logged["cider"] == pytest.approx(sum(expected) / 6, abs=1e-4)


def test_validation_logs_which_captions_of_scenes_are_true_sentences(
    write_tsv: Callable[..., Path],
    caption_rows: Rows,
    validated: Callable[..., dict[str, float]],
) -> None:
    path = write_tsv("valid.tsv", caption_rows)
    cat = Scene((Group("cat", "", (Thing((0.4, 0.0, 0.6, 0.2)),)),), Background("red", "plain", 0))
    lines = [json.dumps({"id": row[0], **scene_as_json(cat)}) for row in caption_rows]
    scenes_file(path).write_text("\n".join(lines))
    said = ["a cat at the top on a red background", "two cats on a red background", "hat", "a cat a cat", "", "one"]
    train_sentencepiece(write_tsv("said.tsv", [[text] for text in said if text]), [0], path.parent, 60)
    config = CaptionConfig(
        data=f"{path},{path}", bpe_dir=str(path.parent), patch_image_size=8, num_bins=10, eval_cider=True
    )
    logged = validated(CaptionTask.setup_task(config), said, batch_size=4)
    shares = [logged[name] for name in ("sentences", "true", "complete")]
    assert shares == pytest.approx([2 / 6, 1 / 6, 3 / 6], abs=1e-4)
    assert "cider" in logged

    scenes_file(path).unlink()
    logged = validated(CaptionTask.setup_task(config), said, batch_size=4)
    assert "cider" in logged and "true" not in logged
    captions = [row[2] for row in caption_rows]
    known = KnownWording(captions, {}).mean(said)
    assert [logged[name] for name in ("new_runs", "doubled", "cut", "novel")] == pytest.approx(known, abs=1e-4)
    assert known.doubled == 1 / 6

    config.data = str(path)  # without a training file
    assert "new_runs" not in validated(CaptionTask.setup_task(config), said, batch_size=4)


def test_captions_of_a_beam_are_compared_by_bleu_or_cider(
    vocabulary: Path, write_tsv: Callable[..., Path], caption_rows: Rows
) -> None:
    counted = write_tsv("train.tsv", caption_rows)
    options = {"data": "a.tsv", "bpe_dir": str(vocabulary), "num_bins": 10}
    texts = ["a red square on a wall", "a red square", "two dogs run"]
    for mbr in ("bleu", "cider"):
        task = CaptionTask.setup_task(CaptionConfig(**options, mbr=mbr, mbr_frequencies=str(counted)))
        agreement = task.search_options(Namespace(beam=3))["agreement"]
        gains = agreement([task.codec.encode(f" {text}") for text in texts])
        assert gains.shape == (3, 3)
        assert (gains.argmax(1) == torch.arange(3)).all()
        assert gains[0, 1] > 0
        assert float(gains[:2, 2].abs().sum() + gains[2, :2].abs().sum()) == pytest.approx(0, abs=0.05)
    with pytest.raises(InputError, match="--mbr-frequencies"):
        CaptionTask.setup_task(CaptionConfig(**options, mbr="cider")).search_options(Namespace(beam=3))


def test_a_caption_is_right_if_it_is_a_reference(vocabulary: Path) -> None:
    task = CaptionTask.setup_task(CaptionConfig(data="a.tsv", bpe_dir=str(vocabulary), num_bins=10))
    said = [[{"tokens": task.codec.encode(f" {text}")}] for text in ("a cat", "a cat", "")]
    sample = {"references": [["two dogs run", "A cat."], ["the cat"], ["a cat"]]}
    assert task.correctness(sample, said) == [1.0, 0.0, 0.0]


def test_scores_of_training_come_from_the_training_captions(
    vocabulary: Path, write_tsv: Callable[..., Path], caption_rows: Rows
) -> None:
    """A second reference is left out without --any-reference; its runs are known in any case."""
    caption_rows[0][2] += "&&two dogs and a cat"
    path = write_tsv("train.tsv", caption_rows)
    options = {"data": str(path), "bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 8}

    def scores(texts: list[str], references: list[str], **more: Any) -> list[float]:
        task = CaptionTask.setup_task(CaptionConfig(**options, **more))
        task.load_dataset("train")
        said, meant = (pad_tokens([task.codec.encode(f" {text}") for text in part], 1) for part in (texts, references))
        lengths, target_lengths = (tokens.ne(1).sum(1)[None] for tokens in (said, meant))
        found: list[float] = task.output_scores(said[None], lengths, meant[None], target_lengths)[0].tolist()
        return found

    first, second = caption_rows[0][2].split("&&")
    other = caption_rows[2][2]
    found = scores([first, second, other, f"{first} {first}"], [first])
    assert found[0] > 0.99  # 1 on average, as short captions lack some n-grams
    assert 0.5 <= found[1] < 0.8 and 0.5 <= found[2] < 0.8  # sentences, but others
    assert found[3] < 0.5
    assert max(scores([first, second], [first, second], any_reference=True)) > 0.7
    assert scores([second], [first], max_references=1)[0] < 0.5  # not among the captions that are learned


def test_captions_that_cannot_score_others_are_an_error(
    vocabulary: Path, write_tsv: Callable[..., Path], caption_rows: Rows
) -> None:
    path = write_tsv("train.tsv", [[*row[:2], "a cat", *row[3:]] for row in caption_rows])
    options = {"data": str(path), "bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 8}
    task = CaptionTask.setup_task(CaptionConfig(**options))
    given = torch.zeros(1, 2, 3, dtype=torch.int64), torch.full((1, 2), 3)
    with pytest.raises(InputError, match="^--score-weight: scores captions by the training captions, which are not"):
        task.output_scores(*given, *given)
    task.load_dataset("train")
    with pytest.raises(
        InputError, match=rf"^--score-weight: {path}: the 6 training rows with references hold the same"
    ):
        task.output_scores(*given, *given)


def test_training_logs_no_cider(vocabulary: Path, criterion: Any) -> None:
    task = CaptionTask.setup_task(CaptionConfig(data="a.tsv", bpe_dir=str(vocabulary), eval_cider=True))
    with metrics.aggregate(new_root=True) as aggregator:
        task.reduce_metrics([{"ntokens": 3, "nsentences": 1}], criterion)
    assert "cider" not in aggregator


@pytest.mark.integration
@pytest.mark.usefixtures("no_java")
@pytest.mark.parametrize(("arch", "criterion"), [("ofa_nano", "label_smoothed_cross_entropy"), ("narvl_nano", "qctc")])
def test_from_tsv_to_text_with_fairseqs_programs(
    arch: str,
    criterion: str,
    run_train: Callable[..., None],
    run_generate: Callable[..., None],
    vocabulary: Path,
    write_tsv: Callable[..., Path],
    caption_rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caption_rows[2][4] = "bm8gaW1hZ2U="  # text that is no image
    train_tsv, valid_tsv = write_tsv("train.tsv", caption_rows), write_tsv("valid.tsv", caption_rows)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    task = ["--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"]
    training = [
        *(f"{train_tsv},{valid_tsv}", *task, "--arch", arch, "--criterion", criterion, "--optimizer", "adam"),
        *("--lr", 1e-4, "--batch-size", 1, "--max-epoch", 1, "--save-dir", tmp_path / "checkpoints"),
        *("--eval-cider", "--best-checkpoint-metric", "cider", "--maximize-best-checkpoint-metric"),
        *("--num-workers", 0, "--no-progress-bar"),
    ]
    with pytest.raises(BadRow, match=r"train\.tsv:3: .*--skip-bad-rows|valid\.tsv:3: .*--skip-bad-rows"):
        run_train(*training)
    run_train(*training, "--skip-bad-rows", 2)
    state = read_checkpoint(tmp_path / "checkpoints" / "checkpoint_last.pt")
    assert state["extra_state"]["train_iterator"]["epoch"] == 2
    run_train(*training, "--skip-bad-rows", 2, "--max-epoch", 2)  # resumes
    run_generate(
        *(valid_tsv, *task, "--path", tmp_path / "checkpoints" / "checkpoint_best.pt", "--skip-bad-rows", 1),
        *("--results-path", tmp_path, "--batch-size", 2, "--scoring", "coco_caption", "--max-len-b", 5),
    )
    lines = (tmp_path / "generate-test.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines if line.startswith("D-")) == [
        f"D-{number}" for number in (0, 1, 3, 4, 5)
    ]
    targets = dict(line[2:].split("\t") for line in lines if line.startswith("T-"))
    assert targets["1"] == "two dogs run"
    assert lines[-1].startswith("Generate test with beam=5: ")
