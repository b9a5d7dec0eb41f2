"""The file that describes the members of a mixture."""

from collections.abc import Callable
from pathlib import Path

import pytest

from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.tasks.members import Member, read_members, texts_of_members
from narvl_plugin.tasks.registered import MultitaskConfig

COMMON = MultitaskConfig(bpe_dir="vocabulary", num_bins=11, skip_bad_rows=3)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], list[Member]]:
    """Read a file of some lines."""

    def write_and_read(text: str) -> list[Member]:
        (tmp_path / "mixture.yaml").write_text(text)
        return read_members(str(tmp_path / "mixture.yaml"), COMMON)

    return write_and_read


def test_members_have_their_tasks_options_and_those_they_share(read: Callable[[str], list[Member]]) -> None:
    caption, gqa = read(
        "caption: {data: 'a.tsv,b.tsv', num_queries: 20, any_reference: true, weight: 0.5}\n"
        "gqa:\n  task: vqa_gen\n  data: c.tsv,d.tsv\n  num_queries: 6\n  selected_cols: 0,1,2,3,4\n  prompt_type: src\n"
    )
    assert (caption.name, caption.weight, caption.num_queries) == ("caption", 0.5, 20)
    assert (gqa.name, gqa.weight, gqa.num_queries) == ("gqa", 1.0, 6)
    assert caption.options.any_reference and not caption.options.eval_cider
    assert (caption.options._name, caption.options.selected_cols) == ("caption", "0,4,2")
    assert (gqa.options._name, gqa.options.selected_cols, str(gqa.options.prompt_type)) == (
        "vqa_gen",
        "0,1,2,3,4",
        "src",
    )
    for member in (caption, gqa):
        assert (member.options.bpe_dir, member.options.num_bins) == ("vocabulary", 11)


GOOD = "data: a.tsv, num_queries: 7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mixture.yaml: has no members"),
        ("- caption", "mixture.yaml: has no members"),
        ("a: [", "mixture.yaml: is not a YAML file of members"),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            "mixture.yaml: is a Git LFS pointer, .*; a YAML file of members",
        ),
        ("<!DOCTYPE html>", "mixture.yaml: is an HTML page"),
        ("refcoco: 7", "member refcoco: expected the options of its task, and found 7"),
        ("refcoco: {}", "member refcoco: num_queries None is not a whole number above 0"),
        ("refcoco: {num_queries: 7}", "member refcoco: lacks its files; add data"),
        (
            f"coco: {{{GOOD}}}",
            "member coco: there is no task 'coco'; set task to one of caption, refcoco, regions, scene_graph, "
            "scene_tree, snli_ve, vqa",
        ),
        (f"a: {{task: multitask, {GOOD}}}", "member a: there is no task 'multitask'"),
        (f"refcoco: {{{GOOD}, weight: 0}}", "member refcoco: weight 0 is not a number above 0"),
        (f"refcoco: {{{GOOD}, weight: .inf}}", "member refcoco: weight inf is not a number above 0"),
        (f"refcoco: {{{GOOD}, weight: often}}", "member refcoco: weight 'often' is not a number above 0"),
        ("refcoco: {data: a.tsv, num_queries: 0}", "member refcoco: num_queries 0 is not a whole number above 0"),
        ("refcoco: {data: a.tsv, num_queries: 7.5}", "member refcoco: num_queries 7.5 is not a whole number above 0"),
        (
            f"refcoco: {{{GOOD}, eval_cider: true}}",
            "the task refcoco has no option 'eval_cider'; it has abstain_below, data, eval_acc,",
        ),
        (f"refcoco: {{{GOOD}, bpe_dir: b}}", "member refcoco: bpe_dir is shared by all members"),
        (f"refcoco: {{{GOOD}, patch_image_size: big}}", r"member refcoco: Value 'big' .*\(patch_image_size\)"),
        (f"'ref:coco': {{task: refcoco, {GOOD}}}", "a name is made of letters"),
    ],
)
def test_what_is_wrong_is_named(read: Callable[[str], list[Member]], text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(text)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(MissingInput, match=r"nowhere\.yaml: no such file; --task multitask reads"):
        read_members("nowhere.yaml", COMMON)


def test_a_vocabulary_is_trained_on_the_texts_of_training_files(tmp_path: Path) -> None:
    (tmp_path / "mixture.yaml").write_text(
        "caption: {data: 'a.tsv,b.tsv,valid.tsv', num_queries: 20}\n"
        "refcoco: {data: 'r.tsv,v.tsv', num_queries: 7}\n"
        "snli_ve: {data: 's.tsv,v.tsv', num_queries: 3}\n"
        "vqa_gen: {data: 'q.tsv', num_queries: 6}\n"
        "gqa: {task: vqa_gen, data: 'g.tsv,v.tsv', num_queries: 6, selected_cols: '0,1,2,3,9', add_object: true}\n"
    )
    assert texts_of_members(str(tmp_path / "mixture.yaml")) == [
        ("a.tsv", [2]),
        ("b.tsv", [2]),
        ("r.tsv", [2]),  # boxes are no text
        ("s.tsv", [3, 4, 5]),
        ("q.tsv", [2, 3]),  # objects are not read
        ("g.tsv", [2, 3, 9]),
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("0,4", r"member caption: --selected-cols 0,4: names 2 columns"),
        ("0,4,x", "member caption: --selected-cols 0,4,x"),
    ],
)
def test_a_vocabulary_of_columns_that_a_task_does_not_have_is_refused(
    tmp_path: Path, columns: str, message: str
) -> None:
    file = tmp_path / "mixture.yaml"
    file.write_text(f"caption: {{data: a.tsv, num_queries: 20, selected_cols: '{columns}'}}\n")
    with pytest.raises(InputError, match=message):
        texts_of_members(str(file))
