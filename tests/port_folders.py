"""Folders in the layout of the ports of OFA, made by the tests' own tables."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MERGES = [("Ġ", "a"), ("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("i", "s"), ("Ġ", "is")]
"""Merges of a small vocabulary."""
PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
"""Bytes that GPT-2 writes as the character of the same number; the others are characters from 256 on."""
SPELLED = [*map(chr, PRINTED), *(chr(256 + place) for place in range(256 - len(PRINTED)))]
"""The letters of GPT-2's pieces."""
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
FORMS = ("bin", "safetensors", "sharded bin", "sharded safetensors")
"""Forms of the weights in a folder."""

PARTS = (
    ("encoder.layers.N.attn_ln.", "encoder.layers.N.self_attn_mid_layer_norm."),
    ("encoder.layers.N.ffn_layernorm.", "encoder.layers.N.ffn_layer_norm."),
    ("decoder.layers.N.ffn_layernorm.", "decoder.layers.N.ffn_layer_norm."),
    ("decoder.layers.N.self_attn_ln.", "decoder.layers.N.self_attn_mid_layer_norm."),
    ("decoder.layers.N.cross_attn_ln.", "decoder.layers.N.cross_attn_mid_layer_norm."),
    ("decoder.layers.N.encoder_attn.", "decoder.layers.N.cross_attn."),
    ("decoder.layers.N.encoder_attn_layer_norm.", "decoder.layers.N.cross_attn_layer_norm."),
)
"""Beginnings of names in OFA's layout and in the ports'."""


def pieces() -> list[str]:
    """Return the symbols of the small vocabulary in order. It is another order than that of GPT-2's numbers."""
    learned = [*reversed(SPELLED), *map("".join, MERGES)]
    return [*SPECIAL, *learned, "<|endoftext|>", "madeupword0000", "madeupword0001", "<mask>"]


def write_vocabulary(folder: Path) -> Path:
    """Write vocab.json and merges.txt of the small vocabulary."""
    folder.mkdir(exist_ok=True)
    labels = {piece: number for number, piece in enumerate(pieces())}
    (folder / "vocab.json").write_text(json.dumps(labels), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, MERGES), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_fairseq_vocabulary(folder: Path) -> Path:
    """Write the same vocabulary as dict.txt, encoder.json and vocab.bpe."""
    folder.mkdir(exist_ok=True)
    encoder = {piece: number for number, piece in enumerate([*SPELLED, *map("".join, MERGES), "<|endoftext|>"])}
    (folder / "encoder.json").write_text(json.dumps(encoder), encoding="utf-8")
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]), encoding="utf-8")
    names = [str(encoder.get(piece, piece)) for piece in pieces()[4:-1]]
    (folder / "dict.txt").write_text("".join(f"{name} 1\n" for name in names), encoding="utf-8")
    return folder


LABELS = len(pieces()) + 8192 + 1000
"""Number of labels of the small vocabulary, with codes and bins."""


def port_name(name: str) -> str:
    """Return the name of a weight in the ports."""
    numbered = re.match(r"(?:en|de)coder\.layers\.(\d+)\.", name)
    for ours, theirs in PARTS if numbered else ():
        before = ours.replace("N", numbered[1])
        if name.startswith(before):
            return theirs.replace("N", numbered[1]) + name.removeprefix(before)
    return name


def port_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a teacher's weights as a port holds them, with an integer table of the ports' length."""
    found = {port_name(name): tensor for name, tensor in state.items() if not name.endswith("coder.version")}
    return found | {"decoder.image_position_idx": torch.arange(1025)}


def port_settings(cfg: Any, labels: int) -> dict[str, Any]:
    """Return the content of config.json for a teacher's configuration."""
    return {
        "model_type": "ofa",
        "d_model": cfg.encoder_embed_dim,
        "encoder_ffn_dim": cfg.encoder_ffn_embed_dim,
        "decoder_ffn_dim": cfg.encoder_ffn_embed_dim,
        "encoder_layers": cfg.encoder_layers,
        "decoder_layers": cfg.decoder_layers,
        "encoder_attention_heads": cfg.encoder_attention_heads,
        "decoder_attention_heads": cfg.encoder_attention_heads,
        "resnet_type": cfg.vision_trunk,
        "token_bucket_size": 256,
        "image_bucket_size": 42,
        "code_image_size": 128,
        "attn_scale_factor": 2,
        "normformer": True,
        "max_position_embeddings": 1024,
        "vocab_size": labels,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }


def write_folder(folder: Path, model: Any, form: str = "bin", *, vocabulary: bool = True) -> Path:
    """Write a teacher as the folder of a port."""
    folder.mkdir(exist_ok=True)
    if vocabulary:
        write_vocabulary(folder)
    state = port_state(model.state_dict())
    settings = port_settings(model.cfg, len(state["encoder.embed_tokens.weight"]))
    (folder / "config.json").write_text(json.dumps(settings))
    write_weights(folder, state, form)
    return folder


def write_weights(folder: Path, state: Mapping[str, Tensor], form: str) -> None:
    """Write weights in one of the forms. Of the three names of the embedding, safetensors keeps one."""
    kind = form.split()[-1]
    stem = "model" if kind == "safetensors" else "pytorch_model"
    if kind == "safetensors":
        tied = ("encoder.embed_tokens.weight", "decoder.output_projection.weight")
        state = {name: tensor for name, tensor in state.items() if name not in tied}
    if not form.startswith("sharded"):
        write_file(folder / f"{stem}.{kind}", state)
        return
    names = sorted(state)
    places = {}
    for number in (1, 2, 3):
        own, file = names[number - 1 :: 3], f"{stem}-0000{number}-of-00003.{kind}"
        write_file(folder / file, {name: state[name] for name in own})
        places |= dict.fromkeys(own, file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def write_file(file: Path, state: Mapping[str, Tensor]) -> None:
    """Write weights into one file."""
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    else:
        torch.save(dict(state), file)
