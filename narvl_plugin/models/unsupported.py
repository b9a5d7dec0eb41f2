"""Parts of OFA's models that ours lack, recognised by the names and shapes of their weights."""

import re
from collections.abc import Mapping

from torch import Tensor

_RESNET = r"(conv1|bn1|layer[123]\.\d+\.(conv\d|bn\d|downsample\.\d))\.(weight|bias|running_\w+|num_batches_tracked)"
PARTS = (
    (r".*\.weight_(self_attn|cross_attn|ffn)", "weights of residual connections (use_gamma_feature)"),
    (r".*\.w_resid", "weights of residual connections (scale_resids)"),
    (r"(.*\.)?mlp_head\..*", "a head of its own (mlp_head)"),
    (r"temp", "a learned temperature (temperature_init_value)"),
    (rf"encoder\.embed_images\.(?!{_RESNET}$).*", "another image backbone, such as the ViT of use_ofasys"),
    (r"(.*[._])?adapters?([._].*)?", "adapters"),
    (r"(.*[._])?prompts?([._].*)?", "a prompt encoder"),
    (r"(.*\.)?classification_heads?\..*", "a classification head"),
)
"""Whole names of weights that our models lack, as patterns, and the part of a model that they belong to."""

_SECOND_TABLE = re.compile(r"(encoder|decoder)\.(token|image)_rel_pos_table_list\.1\.weight")
_TYPES = "encoder.type_embedding.weight"


def unsupported_part(name: str, found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Return the part of a checkpoint's model that our models lack, if it explains why a weight differs.

    Args:
        name: the weight that is missing, left over or of another shape.
        found: the checkpoint's weights by name.
        own: our model's.
    """
    if name not in own:
        return next((part for pattern, part in PARTS if re.fullmatch(pattern, name)), None)
    if name == _TYPES and name in found and found[name].shape[:1] == (1,):
        return "a type embedding of one row"
    table = _SECOND_TABLE.fullmatch(name)
    if table and name not in found and f"{table[1]}.layers.1.fc1.weight" in found:
        return "one table of relative positions for all layers (share_attn_bias)"
    return None
