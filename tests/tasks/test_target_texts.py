"""What fairseq-generate writes and scores as targets: the file's text, whatever the vocabulary can spell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from narvl_plugin.data.for_fairseq import fairseq_dictionary
from narvl_plugin.data.text import TextCodec, clean_target
from narvl_plugin.errors import InputError
from narvl_plugin.evaluation.predictions import read_generated
from narvl_plugin.scoring.coco_caption import CocoCaptionScorer, score_captions
from narvl_plugin.scoring.vqa import VqaScorer, soft_accuracy
from narvl_plugin.tasks.target_texts import TargetTexts

Rows = list[list[str]]

REFERENCES = [
    "Ôné Ωmega dög.&&a cat",
    "Ôné Ωmega dug.&&a cat",  # the vocabulary spells both the same, with <unk>
    "a\u2581cat&&two  dogs",  # and has the sign U+2581 for a space
    "a cat\ron\x0ba mat&&日本",
    "a cat",
    "a cat",
]


def written_targets(path: Path) -> dict[str, str]:
    """Return the text of each T- line by sample id."""
    lines = path.read_bytes().decode().split("\n")
    return dict(line[2:].split("\t", 1) for line in lines if line.startswith("T-"))


@pytest.mark.integration
@pytest.mark.usefixtures("no_java")
@pytest.mark.parametrize(("arch", "criterion", "nbest"), [("ofa_tiny", "cross_entropy", 2), ("narvl_tiny", "qctc", 1)])
def test_captions_are_scored_against_the_text_of_the_file(
    make_model: Callable[..., Path],
    run_generate: Callable[..., None],
    write_tsv: Callable[..., Path],
    caption_rows: Rows,
    vocabulary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    criterion: str,
    nbest: int,
) -> None:
    scored: list[tuple[str, str]] = []
    monkeypatch.setattr(CocoCaptionScorer, "add_string", lambda self, ref, pred: scored.append((ref, pred)))
    monkeypatch.setattr(CocoCaptionScorer, "result_string", lambda self: "")
    model = make_model(arch, criterion)
    for row, references in zip(caption_rows, REFERENCES, strict=True):
        row[2] = references
    test = write_tsv("test.tsv", caption_rows)
    run_generate(
        *(test, "--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"),
        *("--path", model, "--results-path", tmp_path, "--batch-size", 4, "--scoring", "coco_caption"),
        *("--beam", 2, "--nbest", nbest, "--max-len-b", 5),
    )
    expected = ["&&".join(map(clean_target, text.split("&&"))) for text in REFERENCES]
    said = read_generated(tmp_path / "generate-test.txt")
    assert scored == [(text, said[f"{row}"]) for row, text in enumerate(expected)]
    assert written_targets(tmp_path / "generate-test.txt") == {f"{row}": text for row, text in enumerate(expected)}


@pytest.mark.integration
def test_answers_are_scored_against_the_text_of_the_file(
    run_train: Callable[..., None],
    run_generate: Callable[..., None],
    write_tsv: Callable[..., Path],
    vqa_rows: Rows,
    vocabulary: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """This vocabulary has neither digits nor the signs between a confidence and its answer."""
    columns = ["1.0|!+red", "0.9|!+café&&0.3|!+a cat", "0.9|!+cafè&&0.3|!+a cat", "1.0|!+two dogs&&0.3|!+two dogs"]
    for row, column in zip(vqa_rows, columns, strict=True):
        row[3] = column
    train, test = write_tsv("train.tsv", vqa_rows), write_tsv("test.tsv", vqa_rows)
    task = ["--task", "vqa_gen", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"]
    run_train(
        *(train, *task, "--arch", "narvl_nano", "--num-queries", 6, "--criterion", "qctc", "--disable-validation"),
        *("--optimizer", "adam", "--max-update", 1, "--save-dir", tmp_path, "--batch-size", 4, "--no-progress-bar"),
        *("--num-workers", 0, "--no-epoch-checkpoints"),
    )
    scored: list[tuple[str, str]] = []
    add_string = VqaScorer.add_string
    monkeypatch.setattr(
        VqaScorer, "add_string", lambda self, ref, pred: (scored.append((ref, pred)), add_string(self, ref, pred))
    )
    run_generate(
        *(test, *task, "--path", tmp_path / "checkpoint_last.pt", "--results-path", tmp_path, "--batch-size", 3),
        *("--scoring", "vqa"),
    )
    assert [reference for reference, _ in scored] == columns
    assert written_targets(tmp_path / "generate-test.txt") == {f"{row}": text for row, text in enumerate(columns)}
    said = read_generated(tmp_path / "generate-test.txt")
    accuracy = sum(soft_accuracy(said[f"{row}"], {"red": 1.0} if row == 0 else {}) for row in range(4)) / 4
    last = (tmp_path / "generate-test.txt").read_text().splitlines()[-1]
    assert f"soft accuracy {accuracy:.4f} (4 questions)" in last


def test_texts_are_those_of_their_own_targets(codec: TextCodec) -> None:
    """Of two targets that are spelled the same each has its own text; sources and hypotheses have the vocabulary's."""
    dictionary = fairseq_dictionary(codec.dictionary)
    texts = ["Ω cat", "Ψ cat", "a\u2581cat"]
    tokens = [codec.encode(f" {text}") for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=dictionary.pad())
    sources = torch.stack([codec.encode(" a Ω")] * 3)
    writer = TargetTexts(codec)
    writer.remember({"net_input": {"src_tokens": sources}, "target": padded, "target_texts": texts})
    source, hypothesis = dictionary.string(sources[0]), dictionary.string(tokens[0])
    for text, target in zip(texts, tokens, strict=True):
        assert writer.decode(source) == "a <unk>"
        assert writer.decode(dictionary.string(target, escape_unk=True)) == text
        assert writer.decode(hypothesis) == "<unk> cat"
        assert writer.decode(dictionary.string(tokens[2])) == "a cat"
    assert writer.decode(dictionary.string(tokens[1], escape_unk=True)) == "<<unk>> cat"
    writer.remember({"net_input": {"src_tokens": sources}, "target": padded})
    assert writer.decode(source) == "a <unk>"
    assert writer.decode(dictionary.string(tokens[1], escape_unk=True)) == "<<unk>> cat"


@pytest.mark.parametrize("post_process", ["sentencepiece", "letter"])
def test_symbols_that_fairseq_has_joined_are_refused(codec: TextCodec, post_process: str) -> None:
    """They made one word of each text, so that all scores were 0."""
    writer = TargetTexts(codec)
    sources, targets = codec.encode(" two dogs")[None], codec.encode(" a cat")[None]
    for texts in ({"target_texts": ["a cat"]}, {}):
        writer.remember({"net_input": {"src_tokens": sources}, "target": targets, **texts})
        with pytest.raises(InputError, match="--post-process"):
            writer.decode(fairseq_dictionary(codec.dictionary).string(sources[0], post_process))


def test_a_text_is_one_line(codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "decode", lambda tokens: "a cat\n\ron a\u2028mat\n")
    assert TargetTexts(codec).decode("x") == "a cat  on a mat"


@pytest.mark.usefixtures("no_java")
def test_score_is_that_of_the_text() -> None:
    """A reference whose letters are lost has other words."""
    said = {"p": "Ôné dög", "q": "a cat"}
    assert score_captions(said, {"p": ["Ôné dög"], "q": ["a cat"]}).values["CIDEr"] == pytest.approx(5)
    assert score_captions(said, {"p": ["<<unk>>n<<unk>> d<<unk>>g"], "q": ["a cat"]}).values["CIDEr"] < 3
