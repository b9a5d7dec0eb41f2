"""Averaged weights (--store-ema): what they are, what validates, starts and generates with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.dataclass.configs import EMAConfig
from fairseq_cli import train as train_program
from torch import nn

from criterions import QueryCtcCriterion
from criterions.qctc import QueryCtcConfig
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.models.registered import build
from narvl_plugin.tasks.registered import CaptionConfig, CaptionTask
from narvl_plugin.training.ema import AveragedModel

Losses = dict[int, float]
DECAY = 0.75


class TiedModel(nn.Module):
    """One embedding under two names, a frozen layer, and a batch norm with its count of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.output = nn.Linear(2, 3, bias=False)
        self.output.weight = self.embedding.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(2)


@pytest.mark.parametrize(
    ("dtype", "ema_fp32", "tolerance"),
    [(torch.float32, False, 1e-6), (torch.float32, True, 1e-6), (torch.float16, True, 1e-3)],
)
def test_each_tensor_is_averaged_once(dtype: torch.dtype, ema_fp32: bool, tolerance: float) -> None:
    torch.manual_seed(0)
    model = TiedModel().to(dtype)
    averaged = AveragedModel(model, EMAConfig(store_ema=True, ema_decay=DECAY, ema_fp32=ema_fp32, ema_start_update=2))
    frozen = model.frozen.weight.clone()
    weights = []
    for update in range(1, 5):
        with torch.no_grad():
            model.embedding.weight.add_(update)
            model.norm.running_mean.add_(1)
            model.norm.num_batches_tracked.add_(1)
        weights.append(model.embedding.weight.detach().double().clone())
        averaged.step(model, update)
    # Up to the second update it is the model; from there on a quarter of the way to it.
    expected = weights[0]
    for weight in weights[1:]:
        expected = DECAY * expected + (1 - DECAY) * weight
    found = averaged.get_model()
    torch.testing.assert_close(found.embedding.weight.double(), expected, rtol=tolerance, atol=tolerance)
    assert found.output.weight is found.embedding.weight
    mean = 1 + 0.25 + 0.25 * 1.75 + 0.25 * 2.3125  # of 1, 2, 3, 4
    torch.testing.assert_close(found.norm.running_mean.double(), torch.full((2,), mean).double(), rtol=1e-3, atol=1e-3)
    assert found.norm.num_batches_tracked == 4
    assert torch.equal(found.frozen.weight, frozen)
    if ema_fp32:
        kept = averaged.fp32_params["embedding.weight"]
        assert kept.dtype == torch.float32
        torch.testing.assert_close(kept.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ema_fp32", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_averages_move_in_any_precision(dtype: torch.dtype, ema_fp32: bool) -> None:
    """Far from the weights, each of 3,000 steps is less than half precision can tell from none."""
    model = TiedModel().to(dtype)
    with torch.no_grad():
        model.embedding.weight.fill_(1.0)
        model.norm.running_mean.fill_(1.0)
    averaged = AveragedModel(model, EMAConfig(store_ema=True, ema_decay=0.9999, ema_fp32=ema_fp32))
    with torch.no_grad():
        model.embedding.weight.fill_(1.5)
        model.norm.running_mean.fill_(1.5)
    for update in range(3000):
        averaged.step(model, update)
    moved = 0.5 * (1 - 0.9999**3000)  # 0.1296
    found = averaged.get_model()
    for tensor in (found.embedding.weight, found.output.weight, found.norm.running_mean):
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, torch.full_like(tensor, 1 + moved), rtol=0, atol=1e-4)
    assert model.embedding.weight.dtype == dtype
    # A training that goes on, also from a file that holds the average in half precision.
    again = AveragedModel(model, EMAConfig(store_ema=True, ema_decay=0.9999, ema_fp32=ema_fp32))
    again.restore(found.state_dict())
    for average in (averaged, again):
        average.step(model, 3000)
    assert all(map(torch.equal, found.state_dict().values(), again.get_model().state_dict().values()))
    again.restore({name: tensor.to(dtype) for name, tensor in found.state_dict().items()})
    assert again.get_model().embedding.weight.dtype == torch.float32
    torch.testing.assert_close(again.get_model().embedding.weight, found.embedding.weight, rtol=1e-2, atol=0)
    if ema_fp32:  # older files hold the averages twice, of which these are not rounded
        again.build_fp32_params({name: tensor.clone() for name, tensor in averaged.fp32_params.items()})
        assert torch.equal(again.get_model().embedding.weight, found.embedding.weight)


@pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_averaged_model_validates_in_the_precision_of_the_training(
    vocabulary: Path, data: str, arch: str, dtype: torch.dtype
) -> None:
    values = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32, "eval_cider": True}
    task = CaptionTask.setup_task(CaptionConfig(data=data, **values))
    task.load_dataset("valid")
    sizes = {"encoder_embed_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet"}
    torch.manual_seed(1)
    model = build(arch, vocab_size=len(task.target_dictionary), **sizes).eval()
    task.generator = task.build_generator([model], task.generator_options())
    sample = task.dataset("valid").collater([task.dataset("valid")[row] for row in range(3)])
    if arch == "ofa_tiny":
        criterion = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=0.0)
    else:
        criterion = QueryCtcCriterion.build_criterion(QueryCtcConfig(), task)
    expected, _, _ = task.valid_step(sample, model, criterion)
    half = copy.deepcopy(model).to(dtype)
    averaged = AveragedModel(half, EMAConfig(store_ema=True)).get_model()
    products: list[torch.dtype] = []
    averaged.decoder.layers[0].fc1.register_forward_hook(lambda _, inputs, output: products.append(output.dtype))
    pixels = sample["net_input"]["patch_images"].to(dtype)  # as fairseq's trainer hands them over
    sample = sample | {"net_input": sample["net_input"] | {"patch_images": pixels}}
    loss, _, logged = task.valid_step(sample, half, criterion.to(dtype), ema_model=averaged)
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0)
    assert logged["_cider_count"] == 3
    assert set(products) == {dtype}
    assert next(averaged.parameters()).dtype == torch.float32


def test_a_teacher_searches_with_the_averaged_model(
    vocabulary: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32, "eval_cider": True}
    task = CaptionTask.setup_task(CaptionConfig(data=data, **values))
    task.load_dataset("valid")
    sizes = {"encoder_embed_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet"}
    model, averaged = (build("ofa_tiny", vocab_size=len(task.target_dictionary), **sizes).eval() for _ in range(2))
    task.generator = task.build_generator([model], task.generator_options())
    monkeypatch.setattr(model.encoder, "forward", lambda *_, **__: pytest.fail("the last weights were used"))
    batch = task.dataset("valid").collater([task.dataset("valid")[0]])
    criterion = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=0.0)
    _, _, logged = task.valid_step(batch, model, criterion, ema_model=averaged)
    assert logged["_cider_count"] == 1


@pytest.fixture
def short(options: list[object]) -> list[object]:
    """Give options of a short training whose average never leaves the weights it starts from."""
    options += ["--batch-size", 3, "--num-workers", 0, "--max-update", 3, "--dropout", 0, "--ema-decay", 1.0]
    return [*options, "--save-interval-updates", 1]


@pytest.fixture
def half_precision(short: list[object], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Give options of a training in bfloat16, for which fairseq's command line would ask for a TPU."""
    main = train_program.main

    def main_on_cpu(cfg: Any) -> None:
        cfg.common.tpu = False
        main(cfg)

    monkeypatch.setattr(train_program, "main", main_on_cpu)
    return [*short, "--ema-decay", 0.9, "--store-ema", "--memory-efficient-bf16"]


@pytest.mark.integration
@pytest.mark.parametrize("ema_fp32", [[], ["--ema-fp32"]])
def test_averages_of_a_training_in_half_precision_are_kept_whole(
    half_precision: list[object],
    train: Callable[..., Losses],
    tmp_path: Path,
    last_state: Callable[[Path], dict[str, Any]],
    differences: Callable[[Any, Any], list[str]],
    ema_fp32: list[object],
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    options = [*half_precision, *ema_fp32]
    train(*options, "--max-update", 4, "--save-dir", unbroken)
    train(*options, "--max-update", 2, "--save-dir", broken)
    first = weights(broken, averaged=True)
    train(*options, "--max-update", 4, "--save-dir", broken)
    assert differences(last_state(unbroken), last_state(broken)) == []
    last, plain = weights(broken, averaged=True), weights(broken)
    moved = [name for name in last if not torch.equal(last[name], first[name])]
    assert "decoder.query_embed.weight" in moved and "encoder.embed_tokens.weight" in moved
    for name in moved:
        # Weights are in bfloat16, averages between them are not.
        assert torch.equal(plain[name], plain[name].bfloat16().float())
        assert last[name].dtype == torch.float32
        assert not torch.equal(last[name], last[name].bfloat16().float())


@pytest.mark.integration
def test_a_training_goes_on_from_averages_in_half_precision(
    half_precision: list[object], train: Callable[..., Losses], tmp_path: Path
) -> None:
    train(*half_precision, "--max-update", 2, "--save-dir", tmp_path)
    file = tmp_path / "checkpoint_last.pt"
    state = read_checkpoint(file)
    older = {
        name: tensor.bfloat16() if tensor.is_floating_point() else tensor
        for name, tensor in weights(tmp_path, True).items()
    }
    state["extra_state"]["ema"] = older
    torch.save(state, tmp_path / "older.pt")
    (tmp_path / "older.pt").replace(file)  # what was read is still mapped from the other
    train(*half_precision, "--max-update", 3, "--save-dir", tmp_path)
    name = "decoder.query_embed.weight"
    expected = older[name].float().lerp(weights(tmp_path)[name], 0.1)
    torch.testing.assert_close(weights(tmp_path, True)[name], expected, rtol=1e-6, atol=1e-8)


def weights(folder: Path, averaged: bool = False) -> dict[str, torch.Tensor]:
    state = read_checkpoint(folder / "checkpoint_last.pt")
    found: dict[str, torch.Tensor] = state["extra_state"]["ema"] if averaged else state["model"]
    return found


@pytest.mark.integration
def test_validation_is_of_the_averaged_weights(
    short: list[object], train: Callable[..., Losses], tmp_path: Path
) -> None:
    def validated(folder: Path) -> list[float]:
        files = sorted(folder.glob("checkpoint_*_[123].pt")) + [folder / "checkpoint_last.pt"]
        return [read_checkpoint(file)["extra_state"]["val_loss"] for file in files]

    train(*short, "--store-ema", "--save-dir", tmp_path / "averaged")
    first, *others = validated(tmp_path / "averaged")
    assert others and others == [first] * len(others)  # the first weights have one loss
    train(*short, "--save-dir", tmp_path / "plain")
    assert len(set(validated(tmp_path / "plain"))) > 1  # the weights themselves move


@pytest.mark.integration
def test_a_new_training_averages_from_its_own_start(
    short: list[object], train: Callable[..., Losses], tmp_path: Path, differences: Callable[[Any, Any], list[str]]
) -> None:
    plain, averaged, again, seeded = (tmp_path / name for name in ("plain", "averaged", "again", "seeded"))
    train(*short, "--save-dir", plain)
    # From a checkpoint without averages, from one with them, and from another one's averages.
    start = "--finetune-from-model"
    train(*short, "--store-ema", start, plain / "checkpoint_last.pt", "--save-dir", averaged)
    assert differences(weights(averaged, averaged=True), weights(plain)) == []
    assert differences(weights(averaged), weights(plain)) != []
    train(*short, "--store-ema", start, averaged / "checkpoint_last.pt", "--save-dir", again)
    assert differences(weights(again, averaged=True), weights(averaged)) == []
    seed = ["--ema-seed-model", averaged / "checkpoint_last.pt"]
    train(*short, "--store-ema", *seed, start, plain / "checkpoint_last.pt", "--save-dir", seeded)
    assert differences(weights(seeded, averaged=True), weights(averaged, averaged=True)) == []


@pytest.mark.integration
def test_generation_with_averaged_weights(
    short: list[object],
    train: Callable[..., Losses],
    run_generate: Callable[..., None],
    data: str,
    vocabulary: Path,
    tmp_path: Path,
) -> None:
    train(*short, "--store-ema", "--ema-fp32", "--lr", 0.1, "--save-dir", tmp_path)
    checkpoint = tmp_path / "checkpoint_last.pt"
    convert(checkpoint, tmp_path / "converted.pt", ema=True)

    def generated(file: Path, *options: object) -> list[str]:
        run_generate(
            *(data, "--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"),
            *("--path", file, "--results-path", tmp_path, "--batch-size", 5, "--gen-subset", "test", *options),
        )
        lines = (tmp_path / "generate-test.txt").read_text().splitlines()
        return [line for line in lines if line.startswith("H-")]

    averaged = generated(checkpoint, "--ema-eval")
    assert len(averaged) == 5
    assert averaged == generated(tmp_path / "converted.pt")
    assert averaged != generated(checkpoint)
    with pytest.raises(InputError, match=r"converted\.pt: holds no averaged weights"):
        generated(tmp_path / "converted.pt", "--ema-eval")
