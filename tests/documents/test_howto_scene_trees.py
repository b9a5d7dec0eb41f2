"""The page on trees of scenes: its script, its questions in Python and on the command line, its words of labels."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import Newcomer, Page, draw_scene

from narvl_plugin.data.scene_tree import MOST_OBJECTS, MOST_REGIONS, TreeNames
from narvl_plugin.data.text import load_codec, train_sentencepiece
from narvl_plugin.data.trees import read_tree

PAGE = Page("docs/how-to/scene-trees.md")


def test_every_block_is_tested() -> None:
    PAGE.require_tests()


@pytest.fixture
def student(newcomer: Newcomer, save_checkpoint: Callable[..., Path], tree_names_file: Path) -> Newcomer:
    """Give a newcomer with a student of trees, its vocabulary, and a scene."""
    folder = newcomer.folder
    shutil.rmtree(folder / "caption")
    draw_scene(folder)
    (folder / "tree.tsv").write_text("( red blue plain ( left right small dog red hat ( dog ) ) )\n")
    train_sentencepiece(folder / "tree.tsv", [0], folder / "tree_vocab", 300)
    options = {"bpe_dir": str(folder / "tree_vocab"), "num_bins": 0, "patch_image_size": 32}
    save_checkpoint(folder / "student.pt", "narvl", "scene_tree", names_file=str(tree_names_file), **options)
    return newcomer


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")  # of hydra, which reads the options of a training
@PAGE.block("bash run_scripts/scene_tree.sh")
def test_the_script(block: str, newcomer: Newcomer, recorded: Callable[[], list[list[str]]]) -> None:
    """With stand-ins of the programs; test_pipeline.py runs the script for real."""
    newcomer.types(block)
    trained = [call for call in recorded() if call[0] == "fairseq-train"]  # one for each process
    assert {(call[call.index("--task") + 1], call[call.index("--arch") + 1]) for call in trained} == {
        ("scene_tree", "ofa_nano"),
        ("scene_tree", "narvl_nano"),
    }


@pytest.mark.integration
@PAGE.block("import narvl", "asked")
@PAGE.block("narvl tree scene.png", "typed")
def test_a_student_is_asked(asked: str, typed: str, student: Newcomer) -> None:
    (student.folder / "ask.py").write_text(asked)
    text, *things = student.types("python ask.py").splitlines()
    tree = read_tree(text, "output")
    labels = [f"{region.label} {thing.label}" for region in tree.children for thing in region.children]
    assert [re.sub(r" [01]\.\d+$", "", line) for line in things] == labels
    record = json.loads(student.types(typed))
    assert record["text"] == text
    assert record["tree"].keys() == {"label", "probability", "children"}


def test_the_page_shows_a_tree_and_words_that_can_be_used(tmp_path: Path) -> None:
    (tree,) = [block.text for block in PAGE.blocks if block.language == "text"]
    (words,) = [block.text for block in PAGE.blocks if block.language == "json"]
    (tmp_path / "names.json").write_text(words)
    spelled = " ".join(re.findall(r'"(\w+)"', words))
    (tmp_path / "tree.tsv").write_text(f"( {spelled} ( dog ) )\n")
    codec = load_codec(train_sentencepiece(tmp_path / "tree.tsv", [0], tmp_path, 300).parent, num_bins=0)
    names = TreeNames.of_file(tmp_path / "names.json", codec)
    assert names.tokens_of(read_tree(tree, "page"), "page")
    assert "at most four\nregions" in PAGE.text and (MOST_REGIONS, MOST_OBJECTS) == (4, 4)
