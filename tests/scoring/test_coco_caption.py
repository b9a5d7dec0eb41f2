"""Caption metrics against values worked out by hand and against pycocoevalcap called directly."""

import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fairseq import scoring
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from narvl_plugin.errors import InputError
from narvl_plugin.scoring import coco_caption, tokenization
from narvl_plugin.scoring.coco_caption import (
    METRICS,
    CocoCaptionConfig,
    score_captions,
    score_systems,
)

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


@pytest.mark.usefixtures("no_java")
class TestByHand:
    """Values that a pencil gives."""

    def test_identical_captions_have_bleu_and_rouge_one(self) -> None:
        captions = {"p": "a dog sits on a mat", "q": "two cats and a big red bus"}
        scores = score_captions(captions, {key: [text] for key, text in captions.items()})
        for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"):
            assert scores.values[name] == pytest.approx(1.0, abs=1e-6)

    def test_bleu(self) -> None:
        # 2 of 3 words and 1 of 2 pairs match, and 3 words against 5 are too short.
        scores = score_captions({"p": "the cat sat"}, {"p": ["The cat is here, now."]})
        brevity = math.exp(1 - 5 / 3)
        assert scores.values["BLEU-1"] == pytest.approx(brevity * 2 / 3, rel=1e-6)
        assert scores.values["BLEU-2"] == pytest.approx(brevity * math.sqrt(2 / 3 * 1 / 2), rel=1e-6)
        assert scores.values["BLEU-4"] == pytest.approx(0, abs=1e-3)

    def test_rouge(self) -> None:
        # The longest common subsequence of "a b c d" and "a x c" is "a c".
        scores = score_captions({"p": "a b c d"}, {"p": ["a x c"]})
        precision, recall, beta = 2 / 4, 2 / 3, 1.2
        expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
        assert scores.values["ROUGE-L"] == pytest.approx(expected)

    def test_cider(self) -> None:
        # "a" is in every image and weighs nothing; "dog" and "a dog" match wholly, and there are no
        # trigrams or 4-grams: 10 * (1 + 1 + 0 + 0) / 4. The second caption shares only "a".
        hypotheses, references = {"p": "a dog", "q": "a dog"}, {"p": ["a dog"], "q": ["a cat"]}
        scores = score_captions(hypotheses, references)
        assert scores.cider_each == {"p": pytest.approx(5.0), "q": pytest.approx(0.0)}
        assert scores.values["CIDEr"] == pytest.approx(2.5)

    def test_empty_caption_scores_zero(self) -> None:
        scores = score_captions({"p": "", "q": ""}, {"p": ["a dog"], "q": ["a cat"]})
        assert all(value == pytest.approx(0, abs=1e-9) for value in scores.values.values())

    def test_missing_meteor_says_why(self, caplog: pytest.LogCaptureFixture) -> None:
        scores = score_captions({"p": "a dog"}, {"p": ["a dog"]})
        assert "METEOR" not in scores.values
        assert "Java" in scores.missing["METEOR"]
        assert "METEOR missing (METEOR needs Java" in scores.summary()
        assert "no METEOR" in caplog.text


def random_captions(images: int, references: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Draw captions of words that plain splitting leaves alone."""
    draw = random.Random(3)

    def caption() -> str:
        return " ".join(draw.choices(["a", "dog", "two", "cats", "red", "on", "bus"], k=draw.randint(2, 9)))

    names = [f"p{row}" for row in range(images)]
    return {name: caption() for name in names}, {name: [caption() for _ in range(references)] for name in names}


def test_same_as_pycocoevalcap(no_java: None) -> None:
    hypotheses, references = random_captions(images=30, references=4)
    scores = score_captions(hypotheses, references, "plain")
    candidates = {key: [text] for key, text in hypotheses.items()}
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    expected = {f"BLEU-{order}": value for order, value in enumerate(bleu, start=1)}
    expected["ROUGE-L"], _ = Rouge().compute_score(references, candidates)
    expected["CIDEr"], each = Cider().compute_score(references, candidates)
    assert scores.values == pytest.approx(expected)
    assert list(scores.cider_each.values()) == pytest.approx(each.tolist())


@pytest.mark.integration
@needs_java
def test_with_java_all_metrics_are_there_and_systems_do_not_mix() -> None:
    references = {
        "p": ["A dog sits on a mat."],
        "q": ["a bus", "one bus"],
        "r": ["two cats", "a pair of cats"],
    }
    perfect = {"p": "a dog sits on a mat", "q": "one bus", "r": "two cats"}
    partial = {"p": "a dog on two mats", "q": "", "r": "two cats"}
    scores = score_systems({"perfect": perfect, "partial": partial, "again": perfect}, references)
    assert scores["perfect"].tokenizer == "ptb"
    assert set(scores["perfect"].values) == set(METRICS)
    assert not scores["perfect"].missing
    assert scores["perfect"].values["METEOR"] == pytest.approx(1.0)
    assert scores["again"] == scores["perfect"]
    assert scores["partial"] == score_captions(partial, references)
    assert 0 < scores["partial"].values["METEOR"] < 1


def test_broken_meteor_neither_hangs_nor_hides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho 'no memory' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    scores = score_captions({"p": "a dog"}, {"p": ["a dog"]}, "plain")
    assert "no memory" in scores.missing["METEOR"]


def test_hanging_meteor_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(coco_caption, "_METEOR_BASE_SECONDS", 0.2)
    scores = score_captions({"p": "a dog"}, {"p": ["a dog"]}, "plain")
    assert "failed within 0 s" in scores.missing["METEOR"]


def test_a_separator_in_a_text_makes_no_references_of_it_for_meteor(
    put_java: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """METEOR's program cuts its lines at `|||`."""
    monkeypatch.setattr(coco_caption, "_METEOR_BASE_SECONDS", 2)
    put_java(f'while read -r line; do echo "$line" >> {tmp_path}/asked; echo 1; done')
    with pytest.raises(RuntimeError):  # as it gives one line in answer to the last question, not two
        coco_caption._meteor({"p": ["a ||| dog", "a|||dog"]}, {"one": {"p": ["a dog|||"]}})
    first, last = (tmp_path / "asked").read_text().splitlines()
    assert [part.split() for part in first.split("|||")] == [["SCORE"], ["a", "dog"], ["a", "dog"], ["a", "dog"]]
    assert last == "EVAL ||| 1"


@pytest.mark.parametrize("answers", [1, 2, 9])
def test_meteor_that_answers_too_much_or_too_little_gives_no_score(
    put_java: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    """Lines in and out must agree in number. Two captions of one system are asked for five lines."""
    monkeypatch.setattr(coco_caption, "_METEOR_BASE_SECONDS", 1)
    put_java(f"read line; echo 1; read line; echo 1; read line; for number in $(seq {answers}); do echo 1; done")
    captions = {"p": "a dog", "q": "a cat"}
    references = {key: [text] for key, text in captions.items()}
    if answers < 3:
        assert "METEOR program failed" in score_captions(captions, references, "plain").missing["METEOR"]
    else:
        with pytest.raises(InputError, match="METEOR program gave more lines"):
            score_captions(captions, references, "plain")


@pytest.mark.integration
@needs_java
@pytest.mark.parametrize("mark", ["\r", "\r\n", "\x0b", "\x85", "\u2028", "\x1e", "\t", "\ud83d"])
def test_line_ends_in_a_caption_or_reference_change_no_score(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    """One carriage return shifted all later captions, from a CIDEr of 4.36 to 0.51."""
    monkeypatch.setattr(coco_caption, "_meteor", lambda targets, systems: {})
    hypotheses, references = random_captions(images=12, references=2)
    hypotheses = {key: texts[0] for key, texts in references.items()}
    expected = score_captions(hypotheses, references)
    hypotheses["p1"] = hypotheses["p1"].replace(" ", mark)
    references["p3"][1] = references["p3"][1].replace(" ", mark, 1)
    assert score_captions(hypotheses, references) == expected
    assert expected.tokenizer == "ptb"


def test_java_that_never_answers_is_asked_once(
    put_java: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit of METEOR's program is no second wait."""
    put_java("sleep 60")
    monkeypatch.setattr(tokenization, "_PTB_BASE_SECONDS", 0.3)
    scores = score_captions({"p": "a dog", "q": "a cat"}, {"p": ["a dog"], "q": ["a cat"]})
    assert scores.tokenizer == "plain" and scores.values["CIDEr"] == pytest.approx(5)
    assert scores.missing == {"METEOR": "METEOR needs Java, which failed to split words"}


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        ({}, {}, "no captions"),
        ({"p": "a"}, {"q": ["a"]}, "same ids.*p, q"),
        ({"p": "a"}, {"p": []}, "image p has no reference"),
        ({"p": "a"}, {"p": [" "]}, "image p has no reference"),
    ],
)
def test_bad_input_is_named(hypotheses: dict[str, str], references: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_captions(hypotheses, references)


@pytest.mark.usefixtures("no_java")
@pytest.mark.parametrize("words", [501, 100_000])
def test_a_text_too_long_for_a_caption_is_refused(words: int) -> None:
    # ROUGE-L would take as many steps, and as much memory, as the words of both texts multiplied.
    long = "a b " * (words // 2) + "a"
    for hypothesis, reference in ((long, "a"), ("a", long)):
        with pytest.raises(InputError, match=rf"image p has a caption or reference of {words // 2 * 2 + 1:,} words"):
            score_captions({"p": hypothesis}, {"p": [reference]})
    assert score_captions({"p": "a " * 500}, {"p": ["a"]}).values["ROUGE-L"] > 0


@pytest.mark.usefixtures("no_java")
def test_fairseq_builds_the_scorer_by_name() -> None:
    scorer = scoring._build_scorer("coco_caption")
    scorer.add_string("a dog&&one dog", "a dog")
    scorer.add_string("a cat", "a dog")
    expected = score_captions({"0": "a dog", "1": "a dog"}, {"0": ["a dog", "one dog"], "1": ["a cat"]})
    assert scorer.score() == pytest.approx(expected.values["CIDEr"])
    assert scorer.result_string() == expected.summary()
    assert "plain tokenizer" in scorer.result_string()
    before = scorer.score()
    scorer.add_string("a big bus", "a big bus")
    assert scorer.score() > before


@pytest.mark.usefixtures("no_java")
def test_scorer_obeys_its_tokenizer_option() -> None:
    scorer = coco_caption.CocoCaptionScorer(CocoCaptionConfig(caption_tokenizer="ptb"))
    scorer.add_string("a dog", "a dog")
    with pytest.raises(RuntimeError, match="needs Java"):
        scorer.score()
