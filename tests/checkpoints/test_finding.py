"""Models of the Hugging Face hub, with a stand-in of the library that downloads them, and no network."""

import fnmatch
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from narvl_plugin.checkpoints import finding
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.finding import existing, local, local_paths
from narvl_plugin.errors import InputError, MissingInput


class Hub:
    """A stand-in of huggingface_hub: it puts files into a cache, as links to blobs.

    Attributes:
        calls: the patterns of each download.
    """

    def __init__(self, cache: Path, files: tuple[str, ...]) -> None:
        self.cache, self.files = cache, files
        self.calls: list[list[str]] = []
        self.error: Exception | None = None

    def snapshot_download(self, name: str, *, allow_patterns: list[str]) -> str:
        """Download the files of a model that match a pattern; return the folder."""
        self.calls.append(allow_patterns)
        if self.error is not None:
            raise self.error
        model = self.cache / f"models--{name.replace('/', '--')}"
        snapshot = model / "snapshots" / "5e3a"
        for part in (model / "blobs", snapshot):
            part.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns) and not (snapshot / file).exists():
                (model / "blobs" / file).write_bytes(b"content of " + file.encode())
                (snapshot / file).symlink_to(Path("../../blobs") / file)
        return str(snapshot)


ALL = ("config.json", "vocab.json", "merges.txt", "README.md", "model.safetensors", "pytorch_model.bin", "run.py")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """Put the stand-in in the library's place."""
    stand_in = Hub(tmp_path / "cache", ALL)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=stand_in.snapshot_download))
    finding._downloaded.cache_clear()
    return stand_in


@pytest.mark.parametrize("name", ["hf://owner/name", Path("hf://owner/name")])
def test_a_model_is_downloaded_once(name: str | Path, hub: Hub) -> None:
    file = existing(name)
    assert file.name == "model.safetensors" and file.read_bytes() == b"content of model.safetensors"
    assert existing(name) == file and local(name) == file.parent
    assert {one.name for one in file.parent.iterdir()} == {
        *("config.json", "vocab.json", "merges.txt", "model.safetensors")
    }
    assert len(hub.calls) == 1


def test_pickles_are_downloaded_if_there_is_nothing_else(hub: Hub) -> None:
    hub.files = tuple(file for file in ALL if file != "model.safetensors")
    assert existing("hf://owner/name").name == "pytorch_model.bin"
    assert len(hub.calls) == 2


def test_a_model_that_is_no_port_is_named(hub: Hub) -> None:
    hub.files = ("config.json", "tf_model.h5")
    with pytest.raises(MissingInput, match="holds config.json, but no weights"):
        existing("hf://owner/name")


def test_a_model_that_cannot_be_reached_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.error = OSError("no route to the host\nof the hub")
    with pytest.raises(
        InputError, match=r"^hf://owner/name: cannot be downloaded \(no route to the host of the hub\); check"
    ):
        convert(Path("hf://owner/name"), tmp_path / "out.pt")
    hub.error = None  # another attempt is made
    assert existing("hf://owner/name")


@pytest.mark.parametrize(
    "name", ["owner", "owner/name/file", "", "/owner/name/", "owner/na me", "öwner/name", "owner/name@main"]
)
def test_names_that_cannot_be_are_not_looked_up(name: str, hub: Hub) -> None:
    with pytest.raises(
        InputError, match=r"hf://.*: is no name of a model on the Hugging Face hub; give hf://OWNER/NAME"
    ):
        existing(f"hf://{name}")
    assert hub.calls == []


def test_without_the_library_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    finding._downloaded.cache_clear()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        InputError, match=r"hf://owner/name: needs the package huggingface_hub; pip install 'narvl\[hub\]'"
    ):
        existing("hf://owner/name")


def test_a_name_without_its_beginning_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        MissingInput, match="owner/name: no such checkpoint; .*for a model of the Hugging Face hub give hf://"
    ):
        existing("owner/name")
    with pytest.raises(MissingInput) as error:
        existing("models/gone.pt")
    assert "hub" not in str(error.value)


def test_paths_that_colons_join(hub: Hub) -> None:
    snapshot = str(local("hf://owner/name"))
    assert local_paths("hf://owner/name") == snapshot
    assert local_paths("a.pt:hf://owner/name:b.pt:hf://owner/name") == f"a.pt:{snapshot}:b.pt:{snapshot}"
    for paths in ("a.pt:b.pt", "xhf://owner/name", "/hf/owner/name"):
        assert local_paths(paths) == paths


@pytest.mark.integration
def test_programs_of_fairseq_take_names_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    from fairseq import checkpoint_utils, options
    from fairseq.dataclass.configs import CheckpointConfig

    taken_from: list[str] = []
    snapshot = str(local("hf://owner/name"))
    trainer = SimpleNamespace(checkpoint_suffix="", load_checkpoint=lambda path, *_, **__: taken_from.append(path))
    trainer.get_train_iterator = lambda **_: SimpleNamespace(epoch=1)
    trainer.lr_step = lambda _: None
    for given in ({"finetune_from_model": "hf://owner/name"}, {"restore_file": "hf://owner/name"}):
        checkpoint_utils.load_checkpoint(CheckpointConfig(save_dir=str(tmp_path), **given), trainer)
    assert taken_from == [snapshot, snapshot]
    parser = options.get_validation_parser()
    parsed = options.parse_args_and_arch(
        parser, ["data.tsv", "--task", "caption", "--bpe-dir", ".", "--path", "hf://owner/name:b.pt"]
    )
    assert parsed.path == f"{snapshot}:b.pt"
