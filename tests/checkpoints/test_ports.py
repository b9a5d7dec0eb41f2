"""Teachers in folders of the ports' layout: read wherever checkpoints are, written, and refused if they are wrong."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from port_folders import FORMS, LABELS, port_state, write_fairseq_vocabulary, write_file, write_folder, write_weights
from torch import Tensor

import narvl
from narvl_plugin.api.files import predict_files
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.reading import checkpoint_fingerprint, read_checkpoint, whole_checkpoint
from narvl_plugin.checkpoints.record import Checkpoint
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.inference.distillation import distill
from narvl_plugin.models import build
from narvl_plugin.models.interop import EMBEDDING, QUERIES, flags_of, tables_of
from narvl_plugin.models.meta import without_weights
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks import loading

SMALL = {"encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 2}
SIDE = 64
"""Side of the images, in pixels."""


def random_model(arch: str, **overrides: Any) -> OfaModel:
    """Build a model of random weights, of which no norm or bias is as at birth."""
    with without_weights():
        model = build(arch, vocab_size=LABELS, **overrides)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if name.endswith("version"):
            tensor.fill_(3)
        elif tensor.dim() > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(mean=0 if name.endswith(("bias", "mean")) else 1, std=0.1, generator=generator)
        else:
            tensor.fill_(7)
    model.decoder.output_projection.weight = model.encoder.embed_tokens.weight
    return model


def published(file: Path, model: OfaModel) -> dict[str, Tensor]:
    """Write a teacher of a published size as OFA does, and return its weights."""
    state = model.state_dict() | tables_of(model.cfg)
    task = {"_name": "caption", "bpe_dir": "../../utils/BPE", "patch_image_size": SIDE, "num_bins": 1000}
    torch.save(whole_checkpoint(state, {"model": flags_of(model.cfg), "task": task}), file)
    return state


@pytest.fixture(scope="module")
def model() -> OfaModel:
    """Give a small teacher."""
    return random_model("ofa_tiny", **SMALL)


@pytest.fixture(scope="module")
def written(model: OfaModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a port with its weights in one pickle."""
    folder = write_folder(tmp_path_factory.mktemp("ports") / "port", model)
    (folder / "configuration.json").write_text(json.dumps({"model": {"patch_image_size": SIDE}}))
    return folder


@pytest.fixture
def port(written: Path, tmp_path: Path) -> Path:
    """Give a copy of that folder, which a test may change."""
    shutil.copytree(written, tmp_path / "port")
    return tmp_path / "port"


@pytest.fixture(scope="module")
def split(model: OfaModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder without a vocabulary, and with its weights in three files."""
    folder = write_folder(tmp_path_factory.mktemp("split") / "port", model, "sharded safetensors", vocabulary=False)
    (folder / "configuration.json").write_text(json.dumps({"patch_image_size": SIDE}))
    return folder


@pytest.fixture
def sharded(split: Path, tmp_path: Path) -> Path:
    """Give a copy of that folder, which a test may change."""
    shutil.copytree(split, tmp_path / "sharded")
    return tmp_path / "sharded"


def fitted(path: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint by our names."""
    return Checkpoint.read(path).fit()[0].weights


def change(file: Path, **values: Any) -> None:
    """Change values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# --- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_model(form: str, model: OfaModel, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "port", model, form)
    found, expected = fitted(folder), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    if form.startswith("sharded"):
        before = checkpoint_fingerprint(folder)
        part = next(folder.glob("*-00002-of-*"))
        part.write_bytes(part.read_bytes()[:-8] + b"12345678")
        assert checkpoint_fingerprint(folder) != before


def test_weights_in_16_bits_are_read(model: OfaModel, port: Path) -> None:
    halves = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    write_file(port / "pytorch_model.bin", port_state(halves))
    found = fitted(port)
    assert all(torch.equal(found[name], halves[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


def test_safetensors_come_before_pickles(port: Path, model: OfaModel) -> None:
    (port / "pytorch_model.bin").write_bytes(b"")
    write_weights(port, port_state(model.state_dict()), "safetensors")
    assert Checkpoint.read(port).file == port / "model.safetensors"


def test_copies_of_the_embedding_must_agree(port: Path, model: OfaModel) -> None:
    write_file(port / "pytorch_model.bin", port_state(model.state_dict()) | {EMBEDDING: torch.zeros(LABELS, 32)})
    with pytest.raises(InputError, match=r"pytorch_model\.bin: decoder\.embed_tokens\.weight differs from"):
        Checkpoint.read(port).fit()


def test_the_content_decides_and_not_the_name(port: Path, tmp_path: Path) -> None:
    source = published(tmp_path / "ofa.pt", random_model("ofa_tiny"))
    shutil.copyfile(tmp_path / "ofa.pt", port / "pytorch_model.bin")  # OFA's own file, under a port's name
    found = fitted(port)
    assert all(torch.equal(found[name], source[name]) for name in found)


def test_names_of_ofas_own_layout_are_read_too(port: Path, model: OfaModel) -> None:
    write_file(port / "pytorch_model.bin", model.state_dict())
    found = fitted(port)
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_of_the_folder_is_read_like_the_folder(port: Path, tmp_path: Path) -> None:
    for path in (port / "pytorch_model.bin", f"{port}/"):
        assert read_checkpoint(path)["cfg"] == read_checkpoint(port)["cfg"]
    (tmp_path / "checkpoint_last.pt").symlink_to(port)  # as the run scripts give a teacher
    assert Checkpoint.read(tmp_path / "checkpoint_last.pt").fit()
    (port / "config.json").unlink()
    with pytest.raises(InputError, match=r"it holds weights alone, which are read with config\.json of a port"):
        Checkpoint.read(port / "pytorch_model.bin")


def test_options_of_the_task_come_with_the_folder(port: Path) -> None:
    assert dict(Checkpoint.read(port).task) == {"patch_image_size": SIDE, "bpe_dir": str(port)}
    settings = {"patch_image_size": 480, "max_image_size": 512, "prompt_type": "prev_output", "answer2label": "/etc"}
    (port / "configuration.json").write_text(json.dumps({"task": "ofa", "model": settings, "preprocessor": {}}))
    task = loading.load(port, task_name="vqa_gen").task
    assert (task.cfg.patch_image_size, str(task.cfg.prompt_type), task.cfg.data) == (480, "prev_output", "none")
    assert loading.load(port, task_name="caption").task.cfg.patch_image_size == 480
    (port / "configuration.json").unlink()
    (port / "vocab.json").unlink()
    assert dict(Checkpoint.read(port).task) == {}


# --- Outputs ---------------------------------------------------------------------------------------------------------


def images() -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, 256, (1, SIDE, SIDE, 3), dtype=np.uint8))


@torch.no_grad()
def logits(path: Path, bpe_dir: Path) -> Tensor:
    """Return the logits of a teacher for two images, of which the second has no image."""
    (teacher,) = loading.load(path, task_overrides={"bpe_dir": str(bpe_dir)}).models
    generator = torch.Generator().manual_seed(1)
    source = torch.tensor([[0, 9, 300, 8, 2], [0, 500, 7, 2, 1]])
    target = torch.tensor([[0, 12, 5000], [0, 270, 1]])
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=generator)
    found: Tensor = teacher(source, None, target, pixels, torch.tensor([True, False]))[0]
    return found


@pytest.mark.integration
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_there_and_back_changes_no_bit(size: str, tmp_path: Path) -> None:
    bpe_dir = write_fairseq_vocabulary(tmp_path / "bpe")
    source = published(tmp_path / "ofa.pt", random_model(f"ofa_{size}"))
    assert convert(tmp_path / "ofa.pt", tmp_path / "port", to="huggingface", bpe_dir=bpe_dir) == []
    assert {file.name for file in (tmp_path / "port").iterdir()} == {
        *("config.json", "pytorch_model.bin", "vocab.json", "merges.txt")
    }
    (tmp_path / "port" / "configuration.json").write_text(json.dumps({"patch_image_size": SIDE}))
    assert convert(tmp_path / "port", tmp_path / "back.pt", to="ofa") == []
    back = read_checkpoint(tmp_path / "back.pt")
    assert back["model"].keys() == source.keys()
    assert all(torch.equal(back["model"][name], source[name]) for name in source)
    assert all(back["model"][name].dtype == source[name].dtype for name in source)
    assert back["cfg"]["model"] == read_checkpoint(tmp_path / "ofa.pt")["cfg"]["model"]
    assert torch.equal(logits(tmp_path / "ofa.pt", bpe_dir), logits(tmp_path / "port", tmp_path / "port"))
    teachers = (
        narvl.load(tmp_path / "ofa.pt", bpe_dir=bpe_dir, device="cpu"),
        narvl.load(tmp_path / "port", device="cpu"),
    )
    ours, theirs = (teacher.caption(images()) for teacher in teachers)
    assert [one.labels for one in ours] == [one.labels for one in theirs]
    assert [one.confidence for one in ours] == [one.confidence for one in theirs]
    for file in tmp_path.rglob("*.pt"):
        file.unlink()  # half a gigabyte each
    shutil.rmtree(tmp_path / "port")


@pytest.mark.integration
def test_generate_with_a_folder_as_with_its_file(
    port: Path,
    run_generate: Callable[..., None],
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    tmp_path: Path,
) -> None:
    tsv = write_tsv("test.tsv", caption_rows)
    convert(port, tmp_path / "ours.pt")
    found = []
    for path in (port, tmp_path / "ours.pt", f"{port}:{port}"):
        words = ["--task", "caption", "--path", path, "--results-path", tmp_path, "--cpu", "--max-len-b", 5]
        run_generate(tsv, *words, "--batch-size", 2)
        lines = (tmp_path / "generate-test.txt").read_text().splitlines()
        found.append(sorted(line for line in lines if line.startswith("H-")))
    assert len(found[0]) == len(caption_rows)
    assert found[0] == found[1]
    assert [line.split("\t")[2] for line in found[0]] == [line.split("\t")[2] for line in found[2]]


@pytest.mark.integration
def test_programs_of_narvl_take_a_folder(
    port: Path, sharded: Path, write_tsv: Callable[..., Path], caption_rows: list[list[str]], tmp_path: Path
) -> None:
    tsv = write_tsv("train.tsv", caption_rows[:2])
    (tmp_path / "images").mkdir()
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "images" / "a.png")
    for number, (path, vocabulary) in enumerate([(port, None), (sharded, port)]):
        distill(teacher=path, data=tsv, out=tmp_path / f"{number}.tsv", beam=1, max_len_b=4, bpe_dir=vocabulary)
        out = tmp_path / f"{number}.jsonl"
        predict_files([tmp_path / "images"], checkpoint=path, out=out, workers=0, beam=1, bpe_dir=vocabulary)
        assert len(out.read_text().splitlines()) == 1
    assert (tmp_path / "0.tsv").read_bytes() == (tmp_path / "1.tsv").read_bytes()


@pytest.mark.integration
@pytest.mark.parametrize(("family", "way"), [("narvl", "--finetune-from-model"), ("ofa", "--restore-file")])
def test_train_on_from_a_folder(
    family: str,
    way: str,
    port: Path,
    run_train: Callable[..., None],
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    tmp_path: Path,
) -> None:
    sizes = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
    resets = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]
    run_train(
        *(write_tsv("train.tsv", caption_rows), "--task", "caption", "--bpe-dir", port, "--patch-image-size", 32),
        *("--arch", f"{family}_tiny", *sizes, "--freeze-resnet", "--disable-validation", "--no-progress-bar", "--cpu"),
        *(["--num-queries", 30] if family == "narvl" else []),
        *("--criterion", "qctc" if family == "narvl" else "label_smoothed_cross_entropy", "--optimizer", "adam"),
        *("--lr", 1e-3, "--batch-size", 3, "--max-update", 1, "--save-dir", tmp_path / "out", way, port),
        *(resets if way == "--restore-file" else []),
    )
    before, after = fitted(port), read_checkpoint(tmp_path / "out" / "checkpoint_last.pt")["model"]
    backbone = [name for name in after if name.startswith("encoder.embed_images.")]
    assert len(backbone) > 100 and all(torch.equal(before[name], after[name]) for name in backbone)
    assert not torch.equal(before["encoder.image_proj.weight"], after["encoder.image_proj.weight"])
    assert torch.allclose(before["encoder.image_proj.weight"], after["encoder.image_proj.weight"], atol=0.01)
    assert (QUERIES in after) == (family == "narvl")


# --- Writing ---------------------------------------------------------------------------------------------------------


def test_a_student_takes_the_weights_of_a_folder(port: Path, tmp_path: Path) -> None:
    notes = convert(port, tmp_path / "student.pt", arch="narvl", num_queries=9)
    assert [note.split(":")[0] for note in notes] == ["new", "new"]
    after = read_checkpoint(tmp_path / "student.pt")["model"]
    assert len(after[QUERIES]) == 9 and len(after[EMBEDDING]) == LABELS + 1
    with pytest.raises(InputError, match="is a student; the layouts of OFA and its ports are for teachers"):
        convert(tmp_path / "student.pt", tmp_path / "out", to="huggingface")


def test_a_folder_is_written_from_any_layout(port: Path, tmp_path: Path) -> None:
    convert(port, tmp_path / "ours.safetensors")
    convert(tmp_path / "ours.safetensors", tmp_path / "again", to="huggingface")  # its vocabulary is that of the port
    first, second = fitted(port), fitted(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("vocab.json", "merges.txt"):
        read = json.loads if name == "vocab.json" else str
        assert read((tmp_path / "again" / name).read_text()) == read((port / name).read_text())


def test_what_cannot_be_written_is_refused(
    port: Path, vocabulary: Path, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    def refused(message: str, source: Path = port, out: Path = tmp_path / "out", **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            convert(source, out, **{"to": "huggingface", **options})
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.part"))

    refused("port: is not empty; give a new folder", out=port)
    refused("is a file; give the name of a folder", out=port / "merges.txt")
    refused("--to onnx: choose narvl, ofa or huggingface", to="onnx")
    refused("--bpe-dir .* is for --to huggingface", to="narvl", bpe_dir=port)
    refused("spm.model|is not GPT-2's vocabulary", bpe_dir=vocabulary)
    refused("--bpe-dir .*gone: no spm.model", bpe_dir=tmp_path / "gone")
    teacher = write_checkpoint("ofa.pt", "ofa", "caption", bpe_dir=str(vocabulary), num_bins=10)
    refused("is not GPT-2's vocabulary, which the ports of OFA have", source=teacher)
    refused(rf"has {LABELS:,} labels with codes and 1,000 bins, and the model ", source=teacher, bpe_dir=port)
    (port / "vocab.json").unlink()
    refused("does not name a vocabulary that is there; give the folder with it by --bpe-dir")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: is the source; write to another file"):
        convert(port, port / "pytorch_model.bin")


def test_a_full_disk_leaves_no_folder(port: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="out: No space left on device"):
        convert(port, tmp_path / "out", to="huggingface")
    assert not list(tmp_path.glob("out*"))


# --- What is wrong with a folder -------------------------------------------------------------------------------------


class Command:
    """Unpickled the plain way, it runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("form", ["bin", "sharded bin"])
def test_a_pickle_with_code_is_not_run(form: str, model: OfaModel, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "port", model, form)
    file = max(folder.glob("pytorch_model*.bin"))
    torch.save({"encoder.version": Command(tmp_path / "ran")}, file)
    with pytest.raises(InputError, match=rf"{file.name}: refused, because it asks for {os.name}\.system"):
        Checkpoint.read(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", r"config\.json: is not JSON"),
        ("config.json", b"[" * 100_000, r"config\.json: is not JSON"),
        ("config.json", b"[1]", r"config\.json: holds a value of type list; expected an object"),
        ("config.json", b'{"d_model": ' + b"9" * 5000 + b"}", r"config\.json: is not JSON"),
        ("config.json", b'{"d_model": 256, "d_model": 32}', r"config\.json: refused, because it names 'd_model' twice"),
        ("config.json", b'{"a": "' + b"x" * 2**20 + b'"}', r"config\.json: is larger than 1,048,576 bytes"),
        ("config.json", b"<html>", r"config\.json: is an HTML page"),
        ("config.json", b"{}", r"config\.json: lacks d_model, so it does not describe a port of OFA"),
        ("configuration.json", b"{", r"configuration\.json: is not JSON"),
        ("pytorch_model.bin", b"", r"pytorch_model\.bin: is cut off: it is empty"),
        (
            "pytorch_model.bin",
            b"version https://git-lfs.github.com/spec/v1\n",
            r"pytorch_model\.bin: is a Git LFS pointer",
        ),
    ],
)
def test_files_that_are_damaged_are_named(name: str, content: bytes, message: str, port: Path) -> None:
    (port / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Checkpoint.read(port)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 10**12}, "d_model: encoder_embed_dim=1000000000000: expected a number"),
        ({"encoder_layers": "4"}, "encoder_layers: .* is a str; expected int"),
        ({"resnet_type": "hf-hub:stranger/model"}, "resnet_type='hf-hub:stranger/model': choose one of"),
        ({"vocab_size": 50265}, rf"vocab_size=50265, but {EMBEDDING} has {LABELS:,} rows"),
        ({"vocab_size": [1]}, r"vocab_size=\[1\], but"),
        ({"use_ofasys": True}, "use_ofasys=True: the model has a ViT"),
    ],
)
def test_options_that_are_wrong_are_named(values: dict[str, Any], message: str, port: Path) -> None:
    change(port / "config.json", **values)
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        Checkpoint.read(port)


@pytest.mark.parametrize("values", [{"encoder_layers": 9}, {"d_model": 16_384}, {"image_bucket_size": 256}])
def test_sizes_that_the_weights_do_not_have_are_refused(values: dict[str, Any], port: Path, tmp_path: Path) -> None:
    change(port / "config.json", **values)
    for use in (lambda: loading.load(port), lambda: convert(port, tmp_path / "out.pt")):
        with pytest.raises(InputError, match=r"pytorch_model\.bin: the checkpoint and the model differ in \d+ tensors"):
            use()


def test_unknown_weights_are_refused_everywhere(port: Path, model: OfaModel, tmp_path: Path) -> None:
    unknown = {"encoder.layers.0.weight_ffn": torch.zeros(32)}
    write_file(port / "pytorch_model.bin", port_state(model.state_dict()) | unknown)
    for use in (lambda: narvl.load(port), lambda: loading.load(port), lambda: convert(port, tmp_path / "out.pt")):
        with pytest.raises(
            InputError, match=r"pytorch_model\.bin: .*encoder\.layers\.0\.weight_ffn belongs to weights of"
        ):
            use()
    assert convert(port, tmp_path / "out.pt", allow=["*.weight_ffn"])  # if a user knows better


def test_a_chinese_model_is_refused(port: Path) -> None:
    (port / "vocab.json").rename(port / "vocab.txt")
    with pytest.raises(InputError, match=r"port: holds vocab\.txt of a Chinese model of OFA, which is not supported"):
        Checkpoint.read(port)


def test_what_a_folder_lacks_is_named(port: Path) -> None:
    (port / "pytorch_model.bin").unlink()
    with pytest.raises(
        MissingInput, match=r"port: holds config\.json, but no weights; put one of model\.safetensors, "
    ):
        Checkpoint.read(port)
    (port / "config.json").unlink()
    with pytest.raises(MissingInput, match=r"port: is a folder; .*or a folder with config\.json of a Hugging Face or"):
        Checkpoint.read(port)


@pytest.mark.parametrize("name", ["config.json", "configuration.json", "pytorch_model.bin"])
def test_links_out_of_the_folder_are_refused(name: str, port: Path) -> None:
    (port / name).rename(port.parent / name)
    (port / name).symlink_to(port.parent / name)
    with pytest.raises(InputError, match=rf"{name}: is a link that leads out of its folder"):
        Checkpoint.read(port)


def test_a_pipe_is_no_file_of_a_folder(port: Path) -> None:
    (port / "pytorch_model.bin").unlink()
    os.mkfifo(port / "pytorch_model.bin")  # whoever opens it waits for a writer
    with pytest.raises(MissingInput, match="but no weights"):
        Checkpoint.read(port)


# --- Shards ----------------------------------------------------------------------------------------------------------


INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


def place(folder: Path, weight: str, file: object) -> None:
    """Let the index place a weight in another file."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder / INDEX, weight_map=places | {weight: file})


@pytest.mark.parametrize(
    "name",
    ["../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".", "a\nb.safetensors", "x" * 5000],
)
def test_an_index_names_files_of_its_folder_alone(name: str, sharded: Path) -> None:
    (sharded.parent / "other").mkdir()
    write_file(sharded.parent / "other" / "model.safetensors", {"temp": torch.zeros(1)})
    place(sharded, "temp", name)
    with pytest.raises(InputError, match=r"index\.json: .*(expected a file in this folder|expected names that end in)"):
        Checkpoint.read(sharded)


def test_links_of_shards_out_of_the_folder_are_refused(sharded: Path) -> None:
    (sharded / FIRST).rename(sharded.parent / FIRST)
    (sharded / FIRST).symlink_to(sharded.parent / FIRST)
    with pytest.raises(InputError, match=rf"index\.json: .*{FIRST}: is a link that leads out of its folder"):
        Checkpoint.read(sharded)


def test_shards_and_index_must_agree(sharded: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            Checkpoint.read(sharded)

    place(sharded, "temp", FIRST)
    refused(rf"index\.json: places temp in {FIRST}, which lacks it")
    place(sharded, "temp", "model-00004-of-00004.safetensors")
    refused(r"model-00004-of-00004\.safetensors: no such file, and model\.safetensors\.index\.json names it")
    place(sharded, "temp", "evil.bin")
    refused(r"index\.json: names the file evil\.bin; expected names that end in \.safetensors")
    place(sharded, "temp", 3)
    refused(r"index\.json: holds no weight_map")


def test_a_weight_in_two_shards_is_refused(sharded: Path) -> None:
    write_file(sharded / "model-0.safetensors", {"encoder.version": torch.zeros(1)})
    write_file(sharded / "model-1.safetensors", {"encoder.version": torch.ones(1), "temp": torch.ones(1)})
    place(sharded, "encoder.version", "model-0.safetensors")
    place(sharded, "temp", "model-1.safetensors")
    with pytest.raises(InputError, match=r"model-1\.safetensors: holds encoder\.version, which another file"):
        Checkpoint.read(sharded)
    write_file(sharded / "model-1.safetensors", {"more": torch.ones(1), "temp": torch.ones(1)})
    with pytest.raises(
        InputError, match=r"model-1\.safetensors: holds more, which model\.safetensors\.index\.json does not"
    ):
        Checkpoint.read(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{}", "holds no weight_map"),
        (b'{"weight_map": {}}', "holds no weight_map"),
        (b'{"weight_map": ["a"]}', "holds no weight_map"),
        (b'{"weight_map": {"temp": "a", "temp": "b"}}', "refused, because it names 'temp' twice"),
        (
            b'{"weight_map": {"a": ' + b"[" * 200 + b"]" * 200 + b"}}",
            "refused, because it nests lists more than 100 deep",
        ),
        (
            b'{"weight_map": {' + b",".join(b'"%d": "%d"' % (n, n) for n in range(1001)) + b"}}",
            "names 1,001 files; at most",
        ),
        (b" " * 2**24 + b"{}", "is larger than 16,777,216 bytes"),
    ],
    ids=["none", "empty", "list", "twice", "deep", "many", "large"],
)
def test_an_index_that_is_damaged_is_named(content: bytes, message: str, sharded: Path) -> None:
    (sharded / INDEX).write_bytes(content)
    with pytest.raises(InputError, match=rf"index\.json: {message}"):
        Checkpoint.read(sharded)


def test_a_shard_that_holds_something_else_is_named(model: OfaModel, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "port", model, "sharded bin")
    torch.save({"model": {"w": torch.zeros(1)}}, folder / "pytorch_model-00001-of-00003.bin")
    with pytest.raises(InputError, match=r"pytorch_model-00001-of-00003\.bin: holds something else than weights"):
        Checkpoint.read(folder)


def header(**tensors: Any) -> bytes:
    """Return a file of safetensors with this header and eight bytes of values."""
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**62) + b'{"a": 1}',
        struct.pack("<Q", 9) + b'{"a": [1]}' + bytes(8),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [0, 80]}),
        header(a={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}),
        header(a={"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}),
        header(a={"dtype": "X99", "shape": [2], "data_offsets": [0, 8]}),
        header(
            a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            b={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        ),
        header(a={"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}),
    ],
    ids=["length", "no JSON", "beyond", "huge", "backwards", "type", "overlap", "negative"],
)
def test_a_header_of_safetensors_that_is_wrong_is_refused(content: bytes, sharded: Path) -> None:
    (sharded / FIRST).write_bytes(content)
    with pytest.raises(InputError, match=rf"{FIRST}: (is cut off|is damaged|has a header of)"):
        Checkpoint.read(sharded)


def test_a_header_of_safetensors_is_bounded(sharded: Path) -> None:
    large = struct.pack("<Q", 2**23 + 8) + b'{"' + b" " * 2**23 + b'": 1}  ' + bytes(100)
    (sharded / FIRST).write_bytes(large)
    with pytest.raises(InputError, match=rf"{FIRST}: has a header of more than 8,388,608 bytes"):
        Checkpoint.read(sharded)
