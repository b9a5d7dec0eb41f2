"""What a stranger's checkpoint may do: be built as a model of ours, with sizes in limits, and nothing else."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import validate
from omegaconf import OmegaConf
from safetensors.torch import save_file

from narvl_plugin.api.files import predict_files
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.reading import read_checkpoint, whole_checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.inference.distillation import distill
from narvl_plugin.tasks import loading

Rows = list[list[str]]
Write = Callable[..., Path]


@pytest.fixture
def trap(tmp_path: Path) -> tuple[Path, str]:
    """Give a file that is not there, and Python code that makes it."""
    return tmp_path / "executed", f"__import__('pathlib').Path({str(tmp_path / 'executed')!r}).touch() or [(8, 1, 1)]"


@pytest.fixture
def data(write_tsv: Write, caption_rows: Rows) -> Path:
    return write_tsv("test.tsv", caption_rows)


@pytest.fixture
def caption_student(write_checkpoint: Write, vocabulary: Path) -> Path:
    return write_checkpoint("student.pt", "narvl", "caption", bpe_dir=str(vocabulary), num_bins=10, patch_image_size=32)


def hostile_models(code: str) -> dict[str, dict[str, Any]]:
    """Return configurations of fairseq's models that would evaluate the code."""
    return {
        "wav2vec2": {"_name": "wav2vec2", "conv_feature_layers": code},
        "wav2vec": {"_name": "wav2vec", "conv_feature_layers": code},
        "hubert": {"_name": "hubert", "conv_feature_layers": code},
        "fconv": {"_name": "fconv", "encoder_layers": code, "decoder_layers": code},
        "lightconv": {"_name": "lightconv_lm", "character_filters": code, "character_embeddings": True},
        "by arch": {"arch": "wav2vec2", "conv_feature_layers": code},
        "without a name": {"wav2vec2": {"_name": None, "conv_feature_layers": code}},
        "unknown": {"_name": "narvl_giant"},
    }


def hostile(
    tmp_path: Path, vocabulary: Path, model: Any, *, form: str = "pt", task: dict[str, Any] | None = None
) -> Path:
    """Write a checkpoint of plain values in one of the forms that are read."""
    task_cfg = {"_name": "caption", "bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32, **(task or {})}
    cfg = {"model": model, "task": task_cfg, "criterion": {"_name": "cross_entropy"}}
    weights = {"w": torch.zeros(1)}
    if form == "safetensors":
        save_file(weights, tmp_path / "f.safetensors")
        (tmp_path / "f.json").write_text(json.dumps({"cfg": cfg}))
        return tmp_path / "f.safetensors"
    state = whole_checkpoint(weights, cfg)
    if form == "args":
        flags = argparse.Namespace(**{"arch": "wav2vec2", "task": "caption", "data": "x", **task_cfg, **model})
        state |= {"args": flags, "cfg": None}
    torch.save(state, tmp_path / "f.pt")
    return tmp_path / "f.pt"


def run_all(file: Path, data: Path, vocabulary: Path, tmp_path: Path, run_generate: Callable[..., None]) -> None:
    """Try every way in which a checkpoint is given to a command; each must refuse it."""
    images = tmp_path / "pictures"
    images.mkdir(exist_ok=True)
    (images / "a.png").write_bytes(b"")
    for run in (
        lambda: predict_files([images], checkpoint=file, out=None),
        lambda: distill(teacher=file, data=data, out=tmp_path / "out.tsv"),
        lambda: convert(file, tmp_path / "converted.pt"),
        lambda: loading.load(file),
        lambda: run_generate(data, "--task", "caption", "--bpe-dir", vocabulary, "--path", file, "--cpu"),
        lambda: run_validate(data, "--task", "caption", "--bpe-dir", vocabulary, "--path", file),
    ):
        with pytest.raises(InputError):
            run()


def run_validate(*arguments: object) -> None:
    """Run fairseq-validate in this process."""
    words = [str(word) for word in (*arguments, "--cpu", "--valid-subset", "valid", "--batch-size", 4)]
    parsed = options.parse_args_and_arch(options.get_validation_parser(), words)
    given = options.parse_args_and_arch(options.get_validation_parser(), words, suppress_defaults=True)
    validate.main(convert_namespace_to_omegaconf(parsed), given)


@pytest.mark.integration
@pytest.mark.parametrize("form", ["pt", "safetensors", "args"])
@pytest.mark.parametrize("kind", list(hostile_models("")))
def test_no_model_but_ours_is_built_from_a_file(
    kind: str, form: str, trap: tuple[Path, str], vocabulary: Path, tmp_path: Path
) -> None:
    executed, code = trap
    file = hostile(tmp_path, vocabulary, hostile_models(code)[kind], form=form)
    with pytest.raises(InputError):
        loading.load(file)
    assert not executed.exists()


@pytest.mark.integration
@pytest.mark.parametrize("form", ["pt", "safetensors", "args"])
def test_no_command_builds_another_model_from_a_file(
    form: str,
    trap: tuple[Path, str],
    data: Path,
    vocabulary: Path,
    tmp_path: Path,
    run_generate: Callable[..., None],
) -> None:
    executed, code = trap
    file = hostile(tmp_path, vocabulary, hostile_models(code)["wav2vec2"], form=form)
    run_all(file, data, vocabulary, tmp_path, run_generate)
    assert not executed.exists()


def test_no_criterion_of_fairseq_is_built_from_a_file(
    trap: tuple[Path, str], data: Path, vocabulary: Path, caption_student: Path
) -> None:
    executed, code = trap
    state = read_checkpoint(caption_student)
    state["cfg"]["criterion"] = {"_name": "ctc", "wer_args": code, "post_process": "letter", "zero_infinity": True}
    torch.save(state, caption_student.with_name("f.pt"))
    with pytest.raises(InputError, match="--criterion 'ctc': is not for --task caption"):
        run_validate(data, "--task", "caption", "--bpe-dir", vocabulary, "--path", caption_student.with_name("f.pt"))
    assert not executed.exists()


@pytest.mark.integration
@pytest.mark.parametrize("place", ["model", "task", "common", "args"])
def test_references_in_a_configuration_are_not_resolved(
    place: str, data: Path, vocabulary: Path, caption_student: Path, tmp_path: Path, run_generate: Callable[..., None]
) -> None:
    called = []
    OmegaConf.register_new_resolver("trap", lambda: called.append(1) or "x", replace=True)
    state = read_checkpoint(caption_student)
    if place == "args":
        state["args"] = argparse.Namespace(task="caption", arch="narvl", data=["${trap:}"])
    else:
        state["cfg"].setdefault(place, {})["bpe_dir"] = "${trap:}"
    torch.save(state, tmp_path / "f.pt")
    run_all(tmp_path / "f.pt", data, vocabulary, tmp_path, run_generate)
    assert not called


@pytest.mark.parametrize("flags", [{"bpe": "../x"}, {"scoring": "{a"}, {"device_id": [["a"]] * 500}])
def test_older_flags_beside_a_configuration_are_passed_over(flags: dict[str, Any], caption_student: Path) -> None:
    # fairseq builds the model of these flags, which it reads by a grammar and takes for names of files.
    state = read_checkpoint(caption_student)
    state["args"] = argparse.Namespace(arch="narvl", task="caption", data="x", bpe_dir="/etc", num_queries=3, **flags)
    torch.save(state, caption_student.with_name("f.pt"))
    (model,), _, cfg = loading.load(caption_student.with_name("f.pt"))
    assert model.num_queries == cfg["model"]["num_queries"] == 20


def as_older_file(checkpoint: Path, **flags: Any) -> Path:
    """Write a checkpoint as fairseq did before it had configurations: with flags."""
    state = read_checkpoint(checkpoint)
    cfg = state["cfg"]
    task, model = ({name: value for name, value in cfg[part].items() if name != "_name"} for part in ("task", "model"))
    state |= {"args": argparse.Namespace(**{"arch": "narvl", "task": "caption", **task, **model, **flags}), "cfg": None}
    torch.save(state, checkpoint.with_name("older.pt"))
    return checkpoint.with_name("older.pt")


@pytest.mark.integration
@pytest.mark.parametrize("part", ["bpe", "tokenizer", "scoring", "criterion", "optimizer", "lr_scheduler"])
def test_older_flags_open_no_file(part: str, caption_student: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "part.yaml")  # whoever opens it waits for a writer
    up = "/".join([".."] * 40)
    file = as_older_file(caption_student, **{part: f"{up}{tmp_path}/part"})
    assert loading.load(file).models
    with pytest.raises(InputError):
        loading.load(as_older_file(caption_student, device_id=[["a"]] * 5000))


@pytest.mark.parametrize("members", [["caption"], "caption", {"caption": 3, 4: 5}, {"other": {"_name": ["caption"]}}])
def test_members_of_another_form_are_no_members(members: object, caption_student: Path) -> None:
    state = read_checkpoint(caption_student)
    state["task_state"] = {"members": members}
    torch.save(state, caption_student.with_name("f.pt"))
    if isinstance(members, dict):
        with pytest.raises(InputError, match=r"f.pt: was trained on .*, not on 'caption'; choose by --member"):
            loading.load(caption_student.with_name("f.pt"))
    else:
        assert loading.load(caption_student.with_name("f.pt"), task_overrides={"bpe_dir": None}).models


def test_what_one_command_is_to_do_is_not_taken_from_a_file(caption_student: Path, tmp_path: Path) -> None:
    state = read_checkpoint(caption_student)
    state["cfg"]["task"] |= {
        "rescore_with": str(tmp_path / "other.pt"),
        "mbr": "cider",
        "mbr_frequencies": "/etc/passwd",
        "data": "/etc/passwd",
        "abstain_below": 0.9,
        "skip_bad_rows": 1000,
    }
    state["cfg"]["common"] = {"user_dir": str(tmp_path)}
    state["cfg"]["model"]["allow_mismatch"] = "*"
    torch.save(state, tmp_path / "f.pt")
    (model,), task, _ = loading.load(tmp_path / "f.pt")
    cfg = task.cfg
    assert (cfg.rescore_with, cfg.mbr_frequencies, cfg.data) == (None, None, "none")
    assert (str(cfg.mbr), cfg.abstain_below, cfg.skip_bad_rows) == ("none", 0, 0)
    assert model.cfg.allow_mismatch == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_layers", 10**9),
        ("encoder_layers", 0),
        ("encoder_layers", "__import__('os')"),
        ("encoder_embed_dim", 10**12),
        ("encoder_attention_heads", [4]),
        ("num_queries", 10**12),
        ("max_positions", 10**9),
        ("image_bucket_size", 10**9),
        ("temperature", float("nan")),
        ("dropout", "half"),
        ("vision_trunk", "hf-hub:stranger/model"),
        ("vision_trunk", "local-dir:/tmp"),
        ("vision_trunk", 3),
        ("member_queries", "a:b"),
        ("member_queries", "a:99999999999999"),
        ("freeze_resnet", "__import__('os')"),
    ],
)
def test_sizes_and_types_of_a_model_are_limited(name: str, value: object, caption_student: Path) -> None:
    state = read_checkpoint(caption_student)
    state["cfg"]["model"][name] = value
    torch.save(state, caption_student.with_name("f.pt"))
    with pytest.raises(InputError):
        loading.load(caption_student.with_name("f.pt"))
    with pytest.raises((InputError, ValueError)):
        convert(caption_student.with_name("f.pt"), caption_student.with_name("converted.pt"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_bins", 10**12),
        ("num_bins", -1),
        ("patch_image_size", 10**9),
        ("patch_image_size", {"a": 1}),
        ("max_tgt_length", "x"),
        ("bpe_dir", ["a"]),
        ("bpe_dir", "/gone"),
        ("eval_args", "[" * 100_000),
        ("_name", ["caption"]),
    ],
)
def test_options_of_a_task_are_limited(name: str, value: object, caption_student: Path, tmp_path: Path) -> None:
    state = read_checkpoint(caption_student)
    state["cfg"]["task"][name] = value
    torch.save(state, tmp_path / "f.pt")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    with pytest.raises(InputError):
        predict_files([tmp_path / "pictures"], checkpoint=tmp_path / "f.pt", out=None)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"model": None},
        {"model": {}, "cfg": "text"},
        {"model": {"w": torch.zeros(1)}, "cfg": {"model": "text", "task": None}},
        {"model": {"w": 3}, "cfg": {"model": {"_name": "ofa"}, "task": {"_name": "caption"}}, "optimizer_history": 3},
        {"model": {"encoder.embed_tokens.weight": 3}, "cfg": {"model": {"_name": "narvl"}}, "task_state": 4},
        {"model": {}, "args": argparse.Namespace(), "cfg": None},
    ],
)
def test_what_is_no_checkpoint_is_named(content: dict[str, Any], tmp_path: Path, vocabulary: Path) -> None:
    torch.save(content, tmp_path / "f.pt")
    with pytest.raises(InputError, match=r"f\.pt"):
        loading.load(tmp_path / "f.pt", task_overrides={"bpe_dir": str(vocabulary)})
