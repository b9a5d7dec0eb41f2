"""Deterministic weights by parameter name, for checking a re-implementation against the goldens.

The goldens in this folder were computed by running the reference models with every float tensor of
`state_dict()` set to `weight(name, shape)`. A model with the same names and shapes, filled by
`fill(model)`, must therefore reproduce them; no checkpoint travels. numpy's legacy
`RandomState(...).standard_normal` stream is frozen, so the numbers are the same everywhere.
"""

import zlib

import numpy as np

# All aliases of the one shared embedding take the name of the encoder's copy.
TIED = {
    "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
    "decoder.output_projection.weight": "encoder.embed_tokens.weight",
}
NOT_FILLED = (
    "num_batches_tracked",
    "version",
    "token_rp_bucket",
    "image_rp_bucket",
    "image_position_idx",
    "_float_tensor",
)


def is_recipe_key(name):
    return not name.endswith(NOT_FILLED)


def weight(name, shape):
    """Return the float32 array that the parameter or buffer `name` of shape `shape` is filled with."""
    name = TIED.get(name, name)
    shape = tuple(int(s) for s in shape)
    rng = np.random.RandomState(zlib.crc32(name.encode("utf-8")) & 0xFFFFFFFF)
    n = rng.standard_normal(shape)
    leaf = name.split(".")[-1]
    if leaf == "running_mean":
        w = 0.1 * n
    elif leaf == "running_var":
        w = 0.8 + 0.2 * np.abs(n)
    elif leaf in ("c_attn", "w_resid"):
        w = 1.0 + 0.1 * n
    elif leaf == "bias":
        w = 0.02 * n
    elif name == "decoder.layernorm_embedding.weight":
        w = 0.25 + 0.05 * n
    elif leaf == "weight" and len(shape) == 1 and "attn_ln" in name:
        w = 1.6 + 0.5 * n
    elif len(shape) == 1:  # LayerNorm and BatchNorm scales
        w = 1.0 + 0.1 * n
    elif len(shape) == 4:  # convolutions
        w = n * np.sqrt(2.0 / (shape[1] * shape[2] * shape[3])) * 0.7
    elif "rel_pos_table_list" in name:
        w = 0.3 * n
    elif any(s in name for s in ("embed_positions", "embed_image_positions", "type_embedding", "query_embed")):
        w = 0.6 * n
    elif "embed_tokens" in name:
        w = n * (shape[1] ** -0.5)
        w[1] = 0.0  # <pad>
        w[2] *= 1.8  # </s>: some hypotheses finish early
        if shape[0] > 59457:
            w[59457] *= 2.5  # the blank row: some queries emit blank
    elif "q_proj" in name or "k_proj" in name:
        w = 2.5 * n * (shape[1] ** -0.5)
    elif "fc2" in name:
        w = 1.5 * n * (shape[1] ** -0.5)
    elif name.endswith("image_proj.weight"):
        w = 3.0 * n * (shape[1] ** -0.5)
    else:  # linear layers
        w = n * (shape[1] ** -0.5)
    return w.astype(np.float32)


def fill(model):
    """Overwrite every float tensor of `model.state_dict()` with the recipe; return the names filled."""
    import torch

    filled = []
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if is_recipe_key(name) and tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(weight(name, tensor.shape)))
                filled.append(name)
    return filled
