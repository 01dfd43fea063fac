"""Hugging Face's CLIP names to open_clip's and back."""

from __future__ import annotations

import re
from typing import Final

from torch import Tensor

from adaptive_merge.errors import InputError

__all__ = ["MARKER", "PROJECTION", "from_huggingface", "to_huggingface"]

MARKER: Final = "embeddings.class_embedding"
PROJECTION: Final = "visual_projection.weight"
_SINGLE: Final = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
}
_BLOCK: Final = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_LAYER: Final = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_RESBLOCK: Final = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)\.?_?(weight|bias)$")


def from_huggingface(name: str) -> str | None:
    """The open_clip name of a vision tensor (without `vision_model.`), q, k, v still apart; None if it has none.

    The projection is transposed as well: [d, width] there, [width, d] here.
    """
    if match := _LAYER.match(name):
        index, part, kind = match.groups()
        return f"transformer.resblocks.{index}.{_BLOCK[part]}.{kind}" if part in _BLOCK else None
    if name in _SINGLE:
        return _SINGLE[name]
    stem, _, kind = name.rpartition(".")
    return f"{_SINGLE[stem]}.{kind}" if stem in _SINGLE and kind in ("weight", "bias") else None


def to_huggingface(tensors: dict[str, Tensor], *, prefix: str = "vision_model.") -> dict[str, Tensor]:
    """The state dict of a `CLIPVisionModelWithProjection` (of a `CLIPVisionModel` where there is no `proj`).

    Args:
        tensors: by open_clip's names inside the visual tower, as `read_weights` gives them.
        prefix: what stands before the tower's names; `CLIPVisionModel` of transformers ≥ 5 has none.
    """
    single = {name: other for other, name in _SINGLE.items()}
    block = {name: other for other, name in _BLOCK.items()}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        match = _RESBLOCK.match(name)
        if name == "proj":
            state[PROJECTION] = tensor.t().contiguous()
        elif match and match[2] == "attn.in_proj":
            for letter, part in zip("qkv", tensor.chunk(3)):
                state[f"{prefix}encoder.layers.{match[1]}.self_attn.{letter}_proj.{match[3]}"] = part.contiguous()
        elif match and match[2] in block:
            state[f"{prefix}encoder.layers.{match[1]}.{block[match[2]]}.{match[3]}"] = tensor
        elif name in single or stem in single:
            state[prefix + (single[name] if name in single else f"{single[stem]}.{kind}")] = tensor
        else:
            raise InputError(f"tensor `{name}` has no place in a Hugging Face CLIP vision model; export as open_clip")
    return state
