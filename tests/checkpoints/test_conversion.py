"""Published checkpoints through `narvl convert` and fairseq's programs, and what it costs in memory."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.text import load_codec
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.models import build
from narvl_plugin.models.config import SIZES
from narvl_plugin.models.interop import EMBEDDING, EMBEDDING_ALIASES, FIXED_FLAGS, QUERIES, tables_of
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks import loading
from narvl_plugin.whole_files import sole_writer

SMALL = {"encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 2}
QUERY_COUNT = 6
LABELS = 59457  # of the published models
GIBIBYTE = 2**30


def published(file: Path, model: OfaModel, arch: str, *, ema: bool = True) -> dict[str, Tensor]:
    """Write a checkpoint as OFA does, with flags, tables and each name's own embedding, and return its state."""
    state = model.state_dict() | tables_of(model.cfg)
    state |= {name: state[name].clone() for name in EMBEDDING_ALIASES}
    average = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items() if ema}
    sizes = {name: getattr(model.cfg, name) for name in SIZES["tiny"] if name != "vision_trunk"}
    flags = Namespace(arch=arch, **sizes, resnet_type=model.cfg.vision_trunk, **FIXED_FLAGS, label_smoothing=0.1)
    torch.save(
        {
            "args": None,
            "cfg": {
                "_name": None,
                "common": {"seed": 7},
                "model": flags,
                "task": {"_name": "caption", "bpe": None, "data": "elsewhere.tsv", "selected_cols": "0,4,2"},
                "bpe": None,
            },
            "model": state,
            "criterion": None,
            "optimizer_history": [
                {"criterion_name": "Other", "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 9}
            ],
            "task_state": {},
            "extra_state": {
                "train_iterator": {"epoch": 3, "iterations_in_epoch": 0, "shuffle": True, "version": 2},
                "ema": average,
            },
            "last_optimizer_state": {"state": {}, "param_groups": []},
        },
        file,
    )
    return state


@pytest.fixture(scope="module")
def labels(vocabulary: Path) -> int:
    """Return the number of labels of the small vocabulary with ten bins."""
    return len(load_codec(vocabulary, 10).dictionary)


@pytest.fixture
def teacher(tmp_path: Path, labels: int) -> Path:
    """Give a published teacher."""
    published(tmp_path / "ofa.pt", build("ofa_tiny", vocab_size=labels, **SMALL), "ofa_tiny")
    return tmp_path / "ofa.pt"


@pytest.fixture
def parallel(tmp_path: Path, labels: int) -> Path:
    """Give a checkpoint of the authors' parallel model."""
    model = build("narvl_tiny", vocab_size=labels + 1, num_queries=QUERY_COUNT, **SMALL)
    published(tmp_path / "na.pt", model, "na_ofa_tiny")
    return tmp_path / "na.pt"


def weights(file: Path) -> dict[str, Tensor]:
    return read_checkpoint(file)["model"]


@pytest.mark.integration
class TestConvert:
    def test_a_teacher_to_a_student(self, teacher: Path, tmp_path: Path) -> None:
        notes = convert(teacher, tmp_path / "out.pt", arch="narvl_tiny", num_queries=9, allow=["*"])
        assert "reshaped" in "".join(notes)  # the sizes of narvl_tiny are others
        notes = convert(teacher, tmp_path / "student.pt", arch="narvl", num_queries=9)
        before, after = weights(teacher), weights(tmp_path / "student.pt")
        assert len(after[QUERIES]) == 9 and len(after[EMBEDDING]) == len(before[EMBEDDING]) + 1
        same = after.keys() - {EMBEDDING, *EMBEDDING_ALIASES, QUERIES}
        assert all(torch.equal(after[name], before[name]) for name in same)
        assert [note.split(":")[0] for note in notes] == ["new", "new"]

    def test_a_mixture_keeps_the_options_of_its_members(self, teacher: Path, tmp_path: Path) -> None:
        state = read_checkpoint(teacher)
        state["task_state"] = {"members": {"gqa": {"_name": "vqa_gen", "patch_image_size": 96}}}
        torch.save(state, tmp_path / "mixture.pt")
        convert(tmp_path / "mixture.pt", tmp_path / "out.pt")
        assert read_checkpoint(tmp_path / "out.pt")["task_state"] == state["task_state"]
        convert(tmp_path / "mixture.pt", tmp_path / "out.safetensors")
        assert json.loads((tmp_path / "out.json").read_text())["task_state"] == state["task_state"]
        assert read_checkpoint(tmp_path / "out.safetensors")["task_state"] == state["task_state"]

    def test_sizes_that_differ_are_refused(self, teacher: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"ofa.pt: the checkpoint and the model differ in .* tensors \(reshaped: "):
            convert(teacher, tmp_path / "out.pt", arch="narvl_base")
        assert not (tmp_path / "out.pt").exists()

    def test_another_number_of_queries(self, parallel: Path, tmp_path: Path) -> None:
        for count in (4, 8):
            convert(parallel, tmp_path / "out.pt", num_queries=count)
            kept = min(count, QUERY_COUNT)
            after = weights(tmp_path / "out.pt")
            assert len(after[QUERIES]) == count
            assert torch.equal(after[QUERIES][:kept], weights(parallel)[QUERIES][:kept])
            assert torch.equal(after[EMBEDDING], weights(parallel)[EMBEDDING])

    def test_averaged_weights(self, teacher: Path, tmp_path: Path) -> None:
        convert(teacher, tmp_path / "out.pt", ema=True)
        assert torch.equal(weights(tmp_path / "out.pt")[EMBEDDING], weights(teacher)[EMBEDDING] + 1)
        with pytest.raises(InputError, match="out.pt: holds no averaged weights"):
            convert(tmp_path / "out.pt", tmp_path / "again.pt", ema=True)

    def test_to_ofa_and_back_changes_no_bit(self, tmp_path: Path, labels: int) -> None:
        source = published(tmp_path / "ofa.pt", build("ofa_tiny", vocab_size=labels), "ofa_tiny")
        convert(tmp_path / "ofa.pt", tmp_path / "ours.pt")
        convert(tmp_path / "ours.pt", tmp_path / "back.pt", to="ofa")
        back = read_checkpoint(tmp_path / "back.pt")
        assert back["model"].keys() == source.keys()
        assert all(torch.equal(back["model"][name], source[name]) for name in source)
        assert all(back["model"][name].dtype == source[name].dtype for name in source)
        flags, before = back["cfg"]["model"], read_checkpoint(tmp_path / "ofa.pt")["cfg"]["model"]
        assert isinstance(flags, Namespace)
        shared = vars(flags).keys() & vars(before).keys()
        assert {"arch", "resnet_type", "scale_heads", "encoder_layers"} <= shared
        assert all(getattr(flags, name) == getattr(before, name) for name in shared)

    def test_a_second_process_is_refused(self, parallel: Path, tmp_path: Path) -> None:
        for name in ("model.pt", "model.safetensors"):
            with sole_writer(tmp_path / name), pytest.raises(InputError, match=f"{name}: process .* is writing it"):
                convert(parallel, tmp_path / name)
        assert not list(tmp_path.glob("model*"))

    def test_to_safetensors_and_back_changes_no_bit(self, parallel: Path, tmp_path: Path) -> None:
        convert(parallel, tmp_path / "plain.pt")
        convert(tmp_path / "plain.pt", tmp_path / "model.safetensors")
        description = json.loads((tmp_path / "model.json").read_text())
        assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "model.json").stat().st_mode
        assert description["cfg"]["model"]["num_queries"] == QUERY_COUNT
        convert(tmp_path / "model.safetensors", tmp_path / "back.pt")
        plain, back = read_checkpoint(tmp_path / "plain.pt"), read_checkpoint(tmp_path / "back.pt")
        assert plain["cfg"] == back["cfg"]
        assert plain["model"].keys() == back["model"].keys()
        assert all(torch.equal(back["model"][name], tensor) for name, tensor in plain["model"].items())

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            ({"arch": "narvl_giant"}, "unknown --arch narvl_giant"),
            ({"arch": "bart_base"}, "unknown --arch bart_base"),
            ({"num_queries": 5}, "a teacher has no queries; give --arch narvl_SIZE"),
            ({"to": "ofa"}, "OFA's layout is for its own sizes"),
            ({"arch": "narvl", "to": "ofa"}, "is a student; the layouts of OFA and its ports are for teachers"),
        ],
    )
    def test_what_cannot_be_is_refused(
        self, teacher: Path, tmp_path: Path, arguments: dict[str, Any], complaint: str
    ) -> None:
        with pytest.raises(InputError, match=complaint):
            convert(teacher, tmp_path / "out.pt", **arguments)

    def test_files_that_cannot_be_are_refused(self, teacher: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is the source; write to another file"):
            convert(teacher, teacher)
        with pytest.raises(MissingInput, match="gone.pt: no such checkpoint"):
            convert(tmp_path / "gone.pt", tmp_path / "out.pt")
        torch.save({"cfg": {}, "model": {"w": torch.zeros(1)}}, tmp_path / "other.pt")
        with pytest.raises(InputError, match="other.pt: is no checkpoint of OFA or of this project"):
            convert(tmp_path / "other.pt", tmp_path / "out.pt")
        convert(teacher, tmp_path / "model.safetensors")
        (tmp_path / "model.json").unlink()
        with pytest.raises(MissingInput, match="model.json: no such file; it says which model"):
            convert(tmp_path / "model.safetensors", tmp_path / "out.pt")


def generated(run_generate: Callable[..., None], tsv: Path, vocabulary: Path, file: Path, folder: Path) -> list[str]:
    """Return the hypotheses that fairseq-generate prints for a checkpoint, in the order of the rows."""
    run_generate(
        *(tsv, "--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"),
        *("--path", file, "--results-path", folder, "--batch-size", 2, "--max-len-b", 5),
    )
    lines = (folder / "generate-test.txt").read_text().splitlines()
    return sorted(line for line in lines if line.startswith("H-"))


@pytest.mark.integration
def test_a_checkpoint_from_before_an_option_is_read(teacher: Path, vocabulary: Path, tmp_path: Path) -> None:
    convert(teacher, tmp_path / "ours.pt")
    state = read_checkpoint(tmp_path / "ours.pt")
    del state["cfg"]["model"]["freeze_embedding"], state["cfg"]["model"]["dropout"]
    torch.save(state, tmp_path / "old.pt")
    loaded = loading.load(tmp_path / "old.pt", task_overrides={"bpe_dir": str(vocabulary), "num_bins": 10})
    assert loaded.models[0].cfg.dropout == 0.1


@pytest.mark.integration
class TestFairseqsPrograms:
    @pytest.mark.parametrize("kind", ["teacher", "parallel"])
    def test_generate_with_foreign_files_as_with_converted_ones(
        self,
        kind: str,
        request: pytest.FixtureRequest,
        run_generate: Callable[..., None],
        vocabulary: Path,
        write_tsv: Callable[..., Path],
        caption_rows: list[list[str]],
        tmp_path: Path,
    ) -> None:
        source = request.getfixturevalue(kind)
        tsv = write_tsv("test.tsv", caption_rows)
        convert(source, tmp_path / "ours.pt")
        convert(source, tmp_path / "ours.safetensors")
        found = [
            generated(run_generate, tsv, vocabulary, file, tmp_path)
            for file in (source, tmp_path / "ours.pt", tmp_path / "ours.safetensors")
        ]
        assert len(found[0]) == len(caption_rows)
        assert found[0] == found[1] == found[2]
        loaded = loading.load(source, task_overrides={"bpe_dir": str(vocabulary), "num_bins": 10})
        assert loaded.models[0].cfg.encoder_embed_dim == 32

    @pytest.mark.parametrize(
        ("kind", "family", "way"),
        [
            ("teacher", "ofa", "--restore-file"),
            ("teacher", "narvl", "--restore-file"),
            ("teacher", "narvl", "--finetune-from-model"),
            ("parallel", "narvl", "--restore-file"),
        ],
    )
    def test_train_on_from_foreign_files(
        self,
        kind: str,
        family: str,
        way: str,
        request: pytest.FixtureRequest,
        run_train: Callable[..., None],
        vocabulary: Path,
        write_tsv: Callable[..., Path],
        caption_rows: list[list[str]],
        tmp_path: Path,
    ) -> None:
        source = request.getfixturevalue(kind)
        tsv = write_tsv("train.tsv", caption_rows)
        sizes = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", value)]
        resets = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]
        run_train(
            *(tsv, "--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"),
            *("--arch", f"{family}_tiny", *sizes, "--freeze-resnet", "--disable-validation", "--no-progress-bar"),
            *(["--num-queries", 12, "--freeze-embedding"] if family == "narvl" else []),
            *("--criterion", "qctc" if family == "narvl" else "label_smoothed_cross_entropy", "--optimizer", "adam"),
            *("--lr", 1e-3, "--batch-size", 3, "--max-epoch", 1, "--num-workers", 0),
            *("--save-dir", tmp_path / "out", way, source, *(resets if way == "--restore-file" else [])),
        )
        before, after = weights(source), weights(tmp_path / "out" / "checkpoint_last.pt")
        backbone = [name for name in after if name.startswith("encoder.embed_images.")]
        assert len(backbone) > 100 and all(torch.equal(before[name], after[name]) for name in backbone)
        assert not torch.equal(before["encoder.image_proj.weight"], after["encoder.image_proj.weight"])
        if family == "narvl":
            assert len(after[QUERIES]) == 12
            teachers = len(before[EMBEDDING]) - (QUERIES in before)
            assert torch.equal(after[EMBEDDING][:-1], before[EMBEDDING][:teachers])

    def test_say_which_tensors_differ(
        self,
        teacher: Path,
        run_train: Callable[..., None],
        vocabulary: Path,
        write_tsv: Callable[..., Path],
        caption_rows: list[list[str]],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        tsv = write_tsv("train.tsv", caption_rows)
        with pytest.raises(Exception, match="Cannot load model parameters") as caught:
            run_train(
                *(tsv, "--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--cpu", "--arch", "ofa_tiny"),
                *("--optimizer", "adam", "--batch-size", 3, "--save-dir", tmp_path / "out", "--restore-file", teacher),
                *("--disable-validation", "--num-workers", 0, "--no-progress-bar"),
            )
        sys.excepthook(caught.type, caught.value, None)
        complaint = capsys.readouterr().err
        assert complaint.count("\n") == 1
        assert str(teacher) in complaint and "reshaped: encoder.embed_tokens.weight" in complaint


LOADING = """
import sys
from pathlib import Path
from narvl_plugin.tasks import loading
from narvl_plugin.checkpoints.conversion import convert

def memory(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = memory("VmRSS")
if sys.argv[1] == "load":
    loading.load(sys.argv[2], task_overrides={"bpe_dir": sys.argv[3]})
else:
    convert(Path(sys.argv[2]), Path(sys.argv[3]), arch=sys.argv[4])
print(memory("VmHWM") - before)
"""


def peak(*arguments: object) -> int:
    """Return how far memory rises above that of the bare process, in bytes."""
    command = [sys.executable, "-W", "ignore", "-c", LOADING, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def unfilled(arch: str) -> OfaModel:
    """Build a model of the published size, whose weights are what memory holds: they only count."""
    with torch.device("meta"):
        model = build(arch, vocab_size=LABELS)
    return model.to_empty(device="cpu")


@pytest.mark.integration
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux's /proc")
class TestMemory:
    def test_loading_the_base_size(self, tmp_path: Path, measured: Callable[..., None]) -> None:
        (tmp_path / "dict.txt").write_text("".join(f"{token} 1\n" for token in range(50260)))
        model = unfilled("ofa_base")
        published(tmp_path / "ofa_base.pt", model, "ofa_base")
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        del model
        found = peak("load", tmp_path / "ofa_base.pt", tmp_path)
        measured("memory", "loading ofa_base: peak / weights", found / size)
        assert found <= 1.3 * size

    def test_converting_the_huge_size(self, tmp_path: Path, measured: Callable[..., None]) -> None:
        if shutil.disk_usage(tmp_path).free < 12 * GIBIBYTE:
            pytest.skip("needs 12 GiB of disk")
        published(tmp_path / "ofa_huge.pt", unfilled("ofa_huge"), "ofa_huge", ema=False)
        found = peak("convert", tmp_path / "ofa_huge.pt", tmp_path / "narvl_huge.pt", "narvl_huge")
        (tmp_path / "ofa_huge.pt").unlink()
        (tmp_path / "narvl_huge.pt").unlink()
        measured("memory", "converting ofa_huge: peak in GiB", found / GIBIBYTE)
        assert found <= 24 * GIBIBYTE
