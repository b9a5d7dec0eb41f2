"""The program `narvl`: quick where it can be, and errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import narvl as program
import narvl_plugin
from narvl_plugin.cli import app
from narvl_plugin.data.text import load_codec

SCENE = str(Path(narvl_plugin.__file__).parents[1] / "docs" / "images" / "scene.png")


def narvl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Run a command in this process: exit code, what it printed, what it complained of."""
    monkeypatch.setattr(sys, "argv", ["narvl", *arguments])
    try:
        program.main()
        code = 0
    except SystemExit as exit:
        code = int(exit.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_path_is_the_user_dir_from_any_folder_and_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['narvl', 'path']; import narvl; narvl.main();"
        "assert not {'torch', 'fairseq', 'narvl_plugin'} & sys.modules.keys()"
    )
    root = Path(narvl_plugin.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{root / 'narvl_plugin'}\n"


def test_commands_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = narvl(capsys, monkeypatch, "--help")
    assert code == 0
    for command in (
        "path",
        "data",
        "vocab",
        "features",
        "distill",
        "caption",
        "convert",
        "predictions",
        "evaluate",
        "bench",
        "report",
    ):
        assert command in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["features", "gone.tsv", "out.tsv"], "gone.tsv: no such TSV file"),
        (
            ["features", "gone.tsv", "out.tsv", "--arch", "narvl_giant"],
            "narvl_giant: there is no such architecture",
        ),
        (["vocab", "gone.tsv", "--out", "vocab"], "gone.tsv: no such TSV file"),
        (["vocab", "gone.yaml", "--out", "vocab"], "gone.yaml: no such file"),
        (
            ["distill", "--teacher", "gone.pt", "--data", "gone.tsv", "--out", "o.tsv"],
            "gone.tsv: no such TSV file",
        ),
        (["caption", "gone", "--checkpoint", "gone.pt"], "gone: no such image or folder"),
        (["data", "scenes", "--out", "scenes", "--nouns", "1000"], "nouns=1000"),
        (["report", "gone"], "gone"),
        (["convert", "gone.pt", "out.pt"], "gone.pt: no such checkpoint"),
        (["convert", "gone.pt", "out.pt", "--to", "onnx"], "--to onnx: choose narvl, ofa or huggingface"),
        (["data", "coco", "--raw", "gone", "--out", "o"], "gone/dataset_coco.json: no such file"),
        (
            ["data", "vqav2", "--raw", "gone", "--out", "o"],
            "gone/v2_OpenEnded_mscoco_train2014_questions.json: no such",
        ),
        (["data", "gqa", "--raw", "gone", "--out", "o"], "gone/train_balanced_questions.json: no such file"),
        (["data", "refcoco", "--raw", "gone", "--out", "o"], "gone/refcoco/refs(unc).p: no such file"),
        (["data", "grefcoco", "--raw", "gone", "--out", "o"], "gone/grefcoco/grefs(unc).json: no such file"),
        (["data", "visual-genome", "--raw", "gone", "--out", "o"], "gone/image_data.json: no such file"),
        (["data", "snli-ve", "--raw", "gone", "--out", "o"], "gone/snli_ve_train.jsonl: no such file"),
        (["data", "easy-vqa", "--raw", "gone", "--out", "o"], "gone/answers.txt: no such file"),
        (["predictions", "gone.txt", "o.json", "--task", "vqa", "--data", "gone.tsv"], "gone.txt: no such file"),
        (["evaluate", "gone.json", "gone.jsonl", "--task", "snli_ve"], "gone.jsonl: no such file of annotations"),
        (
            [
                "bench",
                "latency",
                "--teacher",
                "t.pt",
                "--student",
                "s.pt",
                "--data",
                "gone.tsv",
                "--out",
                "l.json",
            ],
            "t.pt: no such checkpoint",
        ),
        (["bench", "training", "--data", "gone.tsv"], "--data: give the vocabulary's folder, too, by --bpe-dir"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NARVL_DEBUG", raising=False)
    code, out, err = narvl(capsys, monkeypatch, *arguments)
    assert code == 1
    assert out == ""
    assert err.startswith("narvl: ") and err.count("\n") == 1
    assert complaint in err


@pytest.mark.parametrize("verb", ["graph", "tree"])
def test_the_model_in_the_box_says_what_it_was_not_trained_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.delenv("NARVL_DEBUG", raising=False)
    code, out, err = narvl(capsys, monkeypatch, verb, SCENE)
    assert (code, out) == (1, "")
    has = "it has caption, locate, entails, answer; give the checkpoint of a model that was"
    assert err.splitlines()[-1] == f"narvl: the model in the box: was not trained for {verb}; {has}"


def test_debug_shows_where(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NARVL_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        narvl(capsys, monkeypatch, "vocab", "gone.tsv", "--out", "vocab")


def test_scenes_and_their_vocabulary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = [
        "--train",
        "3",
        "--valid",
        "1",
        "--test",
        "1",
        "--size",
        "32",
        "--nouns",
        "8",
        "--max-objects",
        "2",
    ]
    code, _, _ = narvl(
        capsys, monkeypatch, "data", "scenes", "--out", str(tmp_path), *sizes, "--tasks", "caption,refcoco"
    )
    assert code == 0
    assert {path.parent.name for path in tmp_path.glob("*/*.tsv")} == {"caption", "refcoco"}
    train = tmp_path / "caption" / "train.tsv"
    code, out, _ = narvl(capsys, monkeypatch, "vocab", str(train), "--out", str(tmp_path / "v"), "--vocab-size", "99")
    assert (code, out) == (0, f"{tmp_path / 'v' / 'spm.model'}\n")


MIXTURE = """
caption: {data: 'caption.tsv,unread.tsv', num_queries: 20}
snli_ve: {data: 'snli.tsv,unread.tsv', num_queries: 3}
vqa_gen: {data: 'questions.tsv,unread.tsv', num_queries: 6, selected_cols: '0,1,2,3,4'}
"""


@pytest.fixture
def mixture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Give the file of a mixture in its folder, with training files of one row, and validation files of other words."""
    monkeypatch.chdir(tmp_path)
    Path("caption.tsv").write_text("1\t1\ta zebra runs&&the zebra runs\t\tpicture\n")
    Path("snli.tsv").write_text("1\t1\tpicture\ta cat sits\ta cat\tneutral\n")
    Path("questions.tsv").write_text("1\tpicture\twhat colour\t0.6|!+purple&&0.3|!+rose\tsofa\n")
    Path("unread.tsv").write_text("1\t1\tŵ\tŵ\tŵ\tŵ\n")
    Path("mixture.yaml").write_text(MIXTURE)
    return Path("mixture.yaml")


def test_a_vocabulary_of_a_mixture_holds_what_its_members_read_and_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mixture: Path
) -> None:
    assert narvl(capsys, monkeypatch, "vocab", str(mixture), "--out", "v") == (0, "v/spm.model\n", "")
    codec = load_codec("v", num_bins=0)
    for text in (" zebra", " cat", " maybe", " colour", " purple", " rose"):
        assert len(codec.encode(text)) == 1, text
    pieces = "".join(codec.dictionary.symbols)
    assert "&&" in pieces  # joins captions
    assert "ŵ" not in pieces and "sofa" not in pieces and "neutral" not in pieces and "purple&&" not in pieces


def test_a_vocabulary_of_one_member_is_that_of_its_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mixture: Path
) -> None:
    mixture.write_text("snli_ve: {data: 'snli.tsv,unread.tsv', num_queries: 3}")
    assert narvl(capsys, monkeypatch, "vocab", str(mixture), "--out", "v")[0] == 0
    assert narvl(capsys, monkeypatch, "vocab", "snli.tsv", "--column", "3,4,5", "--out", "w")[0] == 0
    assert Path("v/spm.model").read_bytes() == Path("w/spm.model").read_bytes()


@pytest.mark.parametrize(
    ("text", "options", "complaint"),
    [
        (
            "caption: {data: 'caption.tsv,gone.tsv', num_queries: 20}",
            ["--column", "2"],
            "--column 2: is for a TSV file",
        ),
        ("caption: {data: 'gone.tsv,unread.tsv', num_queries: 20}", [], "gone.tsv: no such TSV file"),
        ("caption: {num_queries: 20}", [], "mixture.yaml: member caption: lacks its files; add data"),
        ("caption: [", [], "mixture.yaml: is not a YAML file of members"),
        (
            "caption: {data: caption.tsv, num_queries: 20, selected_cols: '0,4,9'}",
            [],
            "caption.tsv:1: has 5 columns, column 9",
        ),
        (
            "caption: {data: caption.tsv, num_queries: 20, selected_cols: '0,4,3'}",
            [],
            "caption.tsv: column 3 (columns count from 0) holds no words",
        ),
    ],
)
def test_a_mixture_that_no_vocabulary_can_be_trained_on_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mixture: Path,
    text: str,
    options: list[str],
    complaint: str,
) -> None:
    mixture.write_text(text)
    code, out, err = narvl(capsys, monkeypatch, "vocab", str(mixture), "--out", "v", *options)
    assert (code, out) == (1, "")
    assert err.startswith("narvl: ") and err.count("\n") == 1
    assert complaint in err
    assert not Path("v").exists()


def test_raw_data_become_a_tsv_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = tmp_path / "photos" / "images" / "7.jpg"
    image.parent.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(image)
    question = '{"1": {"imageId": "7", "question": "Is it black?", "answer": "yes"}}'
    (tmp_path / "val_balanced_questions.json").write_text(question)
    out = tmp_path / "tsv" / "val.tsv"
    options = [
        "--raw",
        str(tmp_path),
        "--images",
        str(tmp_path / "photos"),
        "--out",
        str(out.parent),
        "--splits",
        "val",
    ]
    command = ("data", "gqa", *options, "--image-paths", "--check-images")
    code, printed, _ = narvl(capsys, monkeypatch, *command)
    assert (code, printed) == (0, f"{out}: 1 rows written\n")
    assert out.read_text() == "1\t7\tIs it black?\t1.0|!+yes\t\t../photos/images/7.jpg\n"
    code, printed, _ = narvl(capsys, monkeypatch, *command)
    assert (code, printed) == (0, f"{out} is there already; delete it to make it anew\n")


def test_what_was_generated_is_scored_against_the_raw_data(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    types = {"detailed": "x", "semantic": "obj", "structural": "query"}
    questions = {key: {"imageId": "7", "question": "?", "answer": "cat", "types": types} for key in ("1", "2")}
    Path("val_balanced_questions.json").write_text(json.dumps(questions))
    Path("val.tsv").write_text("".join(f"{key}\t7\tWhat?\t1.0|!+cat\t\tx\n" for key in questions))
    Path("generate-test.txt").write_text("D-2\t-0.5\tdog\nD-1\t-0.5\tcat\n")
    command = ("predictions", "generate-test.txt", "said.json", "--task", "gqa", "--data", "val.tsv")
    assert narvl(capsys, monkeypatch, *command) == (0, "said.json: 2 predictions\n", "")
    files = ("said.json", "val_balanced_questions.json")
    code, out, _ = narvl(capsys, monkeypatch, "evaluate", *files, "--task", "gqa", "--out", "scores.json")
    assert code == 0
    assert ["open", "0.5000", "2"] in [line.split() for line in out.splitlines()]
    scores = json.loads(Path("scores.json").read_text())
    assert scores["tables"]["questions"]["all"] == {"accuracy": 0.5, "questions": 2}


def test_settings_of_a_run_are_read_for_its_report(tmp_path: Path) -> None:
    assert app._run_settings(tmp_path) == {}
    (tmp_path / app.SETTINGS_FILE).write_text("PRESET=quick\nDATA=\nNOTE=a=b\n")
    assert app._run_settings(tmp_path) == {"PRESET": "quick", "DATA": "", "NOTE": "a=b"}
