"""What README and the pages of docs/ say of commands, options, settings and files outside of their blocks is there.

The blocks are run by the other tests of this folder. A command in a text that no rule here is about is an error.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from fairseq.dataclass.initialize import hydra_init
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from pages import known_options

import narvl_plugin.hydra_start  # noqa: F401 - registers ${narvl_path:}
from narvl_plugin.cli.app import app
from narvl_plugin.models.config import SIZES
from narvl_plugin.pipeline.keys import KEYS

ROOT = Path(__file__).parents[2]
PAGES = sorted(file.relative_to(ROOT) for file in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = (
    "README.md",
    "SECURITY.md",
    "CONTRIBUTING.md",
    *(str(page) for page in PAGES if page.parts[1] not in ("_build", "results")),
)
"""The pages of results name what was there at the commit of each."""
SOURCES = ("narvl_plugin/**/*.py", "criterions/*.py", "run_scripts/*.sh", "run_scripts/config/**/*.yaml", *DOCUMENTS)
CONFIGS = ROOT / "run_scripts" / "config"
FENCED = re.compile(r"^```\w*\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
OTHERS = {
    "--config-dir",
    "--config-name",
    "--cfg",
    "--multirun",
    "--number",
    "--numeric-suffixes",
    "--additional-suffix",
    "--gpus-per-node",
    "--max-restarts",
    "--nnodes",
    "--no-python",
    "--nodes",
    "--nproc-per-node",
    "--ntasks-per-node",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--rdzv-id",
    "--requeue",
    "--standalone",
}
"""Options of hydra, whose parser is made when it runs, and of split, torchrun and Slurm."""


@cache
def text_of(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


@cache
def spans(file: str) -> list[str]:
    """Return what stands between backticks in a document's text, outside of its blocks."""
    return sorted({" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCED.sub("", text_of(file)))})


def words_of(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Yield a command and all below it, by the words after `narvl`."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from words_of(below, (*path, name))


NARVL = dict(words_of(typer.main.get_command(app)))


# --- Commands --------------------------------------------------------------------------------------------------------

RULES = {
    r"narvl( .*)?": "its command and options are looked up, here and in test_readme.py",
    r"make( [a-z-]+)?": "a target of the Makefile",
    r"bash run_scripts/\w+\.sh( [A-Z_]+=\S+)*": "script and settings are looked up; test_pipeline.py runs each",
    r"bash run_scripts/\{.*\}\.sh \[.*\]": "the scripts are there, and the settings are looked up",
    r"fairseq-(train|generate|validate|hydra-train)( .*)?": "the options are looked up; blocks run the programs",
    r"torchrun( .*)?": "a program of PyTorch",
    r"python docs/\S+\.py": "the script is there",
    r"python OUT/run\.py .*": "a block of README runs it",
    r"pip install ('narvl\[\w+\]'|\.)": "not run, since it downloads packages; what it names is looked up",
}
"""Form of a command in the text -> how it is checked, or why it is not run."""
PROGRAM = re.compile(r"(narvl|make|bash|sh|python\S*|pip|git|docker|conda|torchrun|fairseq-[a-z-]+)( |$)")


@pytest.mark.parametrize("file", DOCUMENTS)
def test_every_command_in_the_text_has_a_rule(file: str) -> None:
    commands = [span for span in spans(file) if PROGRAM.match(span)]
    assert [command for command in commands if not any(re.fullmatch(rule, command) for rule in RULES)] == []


@pytest.mark.parametrize("file", DOCUMENTS)
def test_targets_and_scripts_and_extras_that_documents_name_are_there(file: str) -> None:
    whole = " ".join(spans(file)) + text_of(file)
    targets = set(re.findall(r"^([a-z-]+):.*##", text_of("Makefile"), flags=re.MULTILINE))
    typed = [span for span in spans(file) if span.startswith("make ")] + re.findall(
        r"^make [a-z-]+", "".join(FENCED.findall(text_of(file))), flags=re.MULTILINE
    )
    assert {command.split()[1] for command in typed} <= targets
    for listed in re.findall(r"run_scripts/\{([\w,]+)\}\.sh", whole):
        assert all((ROOT / "run_scripts" / f"{name}.sh").is_file() for name in listed.split(","))
    for script in re.findall(r"run_scripts/\w+\.sh", whole):
        assert (ROOT / script).is_file()
    for extra in re.findall(r"narvl\[(\w+)\]", whole):
        assert f'"{extra}": ' in text_of("setup.py")


@pytest.mark.parametrize("pattern", SOURCES)
def test_commands_of_narvl_that_comments_messages_and_documents_name_are_there(pattern: str) -> None:
    groups = {path[0] for path in NARVL if len(path) == 2}
    for file in ROOT.glob(pattern):
        for first, second in re.findall(
            r"[`(]narvl ([a-z]\S*?)(?: ([a-z][a-z-]*))?(?=[`\s),.;:])", file.read_text("utf-8")
        ):
            assert (first,) in NARVL, f"{file}: narvl {first}"
            assert first not in groups or not second or (first, second) in NARVL, f"{file}: narvl {first} {second}"


@pytest.mark.parametrize("file", DOCUMENTS)
def test_blocks_of_commands_are_well_formed(file: str) -> None:
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text_of(file), flags=re.MULTILINE | re.DOTALL):
        if language == "bash":
            subprocess.run(["bash", "-n"], input=block, text=True, check=True)


# --- Options and settings --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("file", DOCUMENTS)
def test_options_that_documents_name_are_there(file: str) -> None:
    text = re.sub(r"^pip .*", "", text_of(file), flags=re.MULTILINE)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*(?!…)\b", text)) - {"--reset"}  # --reset-…
    assert named - known_options() - OTHERS == set()


def test_settings_that_documents_name_are_those_of_the_scripts() -> None:
    named = set()
    for file in DOCUMENTS:
        for command in re.findall(r"bash run_scripts/\S+ (.*)", text_of(file)):
            named |= set(re.findall(r"\b([A-Z_]+)=", command))
    assert len(named) >= 3
    assert named - {"KEY"} <= {key.name for key in KEYS}


def test_scripts_are_well_formed_and_their_headers_name_them() -> None:
    for script in (ROOT / "run_scripts").glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
        usage = re.findall(r"^#   bash (\S+)", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert usage in ([], [f"run_scripts/{script.name}"]), script
        assert usage or script.name == "common.sh"  # which box.sh sources


# --- Files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", DOCUMENTS)
def test_files_of_the_repository_that_documents_name_are_there(file: str) -> None:
    """A path with a folder of the repository at its beginning; other names are those of files that users have.

    The files of the task `colour` are those that a reader of its page adds.
    """
    for span in spans(file):
        first, _, rest = span.partition("/")
        if (
            first not in ("", "runs")  # which the scripts make
            and rest
            and "colour" not in rest
            and re.fullmatch(r"[\w*./-]+", span)
            and (ROOT / first).is_dir()
            and "_build" not in span
        ):
            assert list(ROOT.glob(span.rstrip("/"))), span


# --- Hydra -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composes() -> Iterator[Any]:
    """Give a function that composes a configuration, which raises for options that are not there."""

    def run(overrides: list[str]) -> Any:
        hydra_init("train")
        with initialize_config_dir(str(CONFIGS), version_base="1.1"):
            return compose("train", overrides)

    yield run
    GlobalHydra.instance().clear()


def commented_commands(file: Path) -> Iterator[list[str]]:
    """Yield the overrides of each command in a YAML file's comments."""
    text = re.sub(r"\\\n#", " ", file.read_text(encoding="utf-8"))
    for overrides in re.findall(r"--config-name train (.*)", text):
        yield shlex.split(overrides)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "file",
    [CONFIGS / "train.yaml", CONFIGS / "embedded" / "common.yaml", *sorted(CONFIGS.glob("recipe/*.yaml"))],
    ids=lambda f: f.stem,
)
def test_commands_in_the_comments_of_configurations_compose(composes: Any, file: Path) -> None:
    found = list(commented_commands(file))
    assert found or file.stem in ("common", "refcocog")
    for overrides in found:
        composes(overrides)
    for added in re.findall(r"(role=teacher(?: \S+=\S+)*),", file.read_text(encoding="utf-8").replace("\n# ", " ")):
        cfg = composes([f"recipe={file.stem}", *added.split()])
        assert cfg.criterion._name == "adjust_label_smoothed_cross_entropy"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_overrides_in_documents_compose(composes: Any) -> None:
    found = [
        word
        for file in DOCUMENTS
        for span in spans(file)
        for word in span.split()
        if re.fullmatch(r"\+?[a-z0-9_.]+=\S+", word)
    ]
    found = [word for word in found if re.match(r"\+?(task|model|role|optimization|common)[.=]", word)]
    assert len(found) >= 4
    composes(["recipe=gqa", *found])


@pytest.mark.parametrize("file", DOCUMENTS)
def test_sizes_that_documents_name_are_there(file: str) -> None:
    for family, first, last in re.findall(r"--arch (\w+?)_(\w+) … \1_(\w+)", text_of(file)):
        assert family in ("ofa", "narvl") and {first, last} <= set(SIZES)
