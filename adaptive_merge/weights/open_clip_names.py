"""The tensors of open_clip's CLIP vision transformer: their names, order and shapes, and how to find them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.limits import LAYERS

__all__ = [
    "BLOCK",
    "architecture_of",
    "expected_shapes",
    "fuse_attention",
    "is_text_leftover",
    "parameter_names",
    "tower_prefix",
    "unwrapped",
]

Value = TypeVar("Value")

# Of one transformer block, in the image tower and in the text tower.
BLOCK: Final = (
    *("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight"),
    *("attn.out_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias"),
    *("mlp.c_proj.weight", "mlp.c_proj.bias"),
)
_FIRST_MLP: Final = "transformer.resblocks.0.mlp.c_fc.weight"
_BLOCK_INDEX: Final = re.compile(r"transformer\.resblocks\.(\d{1,9})\.")
_SPLIT: Final = re.compile(r"(.*\.attn\.)([qkv])(_proj_weight|(?:_proj)?\.weight|(?:_proj)?\.bias)$")
_LEFTOVER: Final = re.compile(
    r"(?:[\w.]+\.)?(?:positional_embedding|text_projection(?:\.\w+)?|logit_scale|logit_bias|attn_mask|"
    r"token_embedding\.weight|ln_final\.(?:weight|bias)|transformer\..*|text\..*|text_model\..*|"
    r"input_resolution|context_length|vocab_size)$"
)


def parameter_names(layers: int, *, projection: bool = True) -> list[str]:
    """Names in `VisionTransformer.named_parameters()` order: 8 + 12 · layers (152 for ViT-B/32), one less without."""
    blocks = [f"transformer.resblocks.{index}.{name}" for index in range(layers) for name in BLOCK]
    head = ["class_embedding", "positional_embedding", *(["proj"] if projection else []), "conv1.weight"]
    return [*head, "ln_pre.weight", "ln_pre.bias", *blocks, "ln_post.weight", "ln_post.bias"]


def expected_shapes(
    *, width: int, layers: int, patch: int, image_size: int, mlp_width: int, embed_dim: int | None
) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor, in order; without `proj` where `embed_dim` is None."""
    block = {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "mlp.c_fc.weight": (mlp_width, width),
        "mlp.c_fc.bias": (mlp_width,),
        "mlp.c_proj.weight": (width, mlp_width),
    }
    single: dict[str, tuple[int, ...]] = {
        "positional_embedding": ((image_size // patch) ** 2 + 1, width),
        "conv1.weight": (width, 3, patch, patch),
    }
    if embed_dim is not None:
        single["proj"] = (width, embed_dim)
    names = parameter_names(layers, projection=embed_dim is not None)
    return {name: single.get(name) or block.get(_BLOCK_INDEX.sub("", name), (width,)) for name in names}


def architecture_of(tensors: Mapping[str, Any], path: str) -> dict[str, Any]:
    """width, layers, patch, image_size (pixels), mlp_width, embed_dim as the tensors' shapes tell them.

    Args:
        tensors: anything with a `shape`, by open_clip's names.
    """
    blocks = {int(match[1]) for name in tensors if (match := _BLOCK_INDEX.match(name))}
    ranks = {"class_embedding": 1, "positional_embedding": 2, "conv1.weight": 4, _FIRST_MLP: 2}
    missing = [name for name in ranks if name not in tensors]
    if missing:
        raise InputError(
            f"`{path}`: no tensor `{missing[0]}`; expected a CLIP vision transformer (ResNet, timm and text towers "
            "are not read); convert the file to an open_clip or Hugging Face CLIP folder"
        )
    for name, rank in (ranks | ({"proj": 2} if "proj" in tensors else {})).items():
        if len(tensors[name].shape) != rank:
            raise InputError(
                f"`{path}`: tensor `{name}`: expected {rank} dimensions, found {tuple(tensors[name].shape)}; the file "
                "is not a CLIP vision transformer"
            )
    if len(blocks) > LAYERS or max(blocks) + 1 > len(blocks):
        raise InputError(
            f"`{path}`: blocks up to number {max(blocks)}, {len(blocks)} of them there; expected all from 0 on, "
            f"at most {LAYERS}; the file is incomplete"
        )
    if any(0 in tuple(tensors[name].shape) for name in ranks):
        raise InputError(f"`{path}`: a tensor without numbers; the file is not a CLIP vision transformer")
    width, patch = int(tensors["class_embedding"].shape[0]), int(tensors["conv1.weight"].shape[-1])
    side = math.isqrt(max(int(tensors["positional_embedding"].shape[0]) - 1, 0))
    projection = tensors.get("proj")
    return {
        "width": width,
        "layers": max(blocks) + 1,
        "patch": patch,
        "image_size": side * patch,
        "mlp_width": int(tensors[_FIRST_MLP].shape[0]),
        "embed_dim": None if projection is None else int(projection.shape[-1]),
    }


def unwrapped(loaders: Mapping[str, Value], path: str) -> dict[str, Value]:
    """The tensors without the `_orig_mod.` that torch.compile puts before the names of what it has compiled.

    All other wrappers' names (`module.`, `model.`) stand before the whole tower: see `tower_prefix`.
    """
    plain = {name.replace("_orig_mod.", ""): value for name, value in loaders.items()}
    if len(plain) < len(loaders):
        raise InputError(f"`{path}`: tensors both with and without `_orig_mod.`; save one state dict of one model")
    return plain


def tower_prefix(names: Iterable[str], marker: str, path: str, kind: str = "image") -> str | None:
    """What stands before `marker` (a tensor that the tower alone has), or None where it is not there."""
    prefixes = sorted({name.removesuffix(marker) for name in names if name == marker or name.endswith(f".{marker}")})
    if len(prefixes) > 1:
        raise InputError(
            f"`{path}`: {len(prefixes)} {kind} towers in one file, at {', '.join(map(repr, prefixes[:4]))}; expected "
            "one; save the one that is meant as a file of its own"
        )
    return prefixes[0] if prefixes else None


def is_text_leftover(name: str) -> bool:
    """Whether a tensor outside the image tower belongs to CLIP's text side."""
    return _LEFTOVER.match(name) is not None


def fuse_attention(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors with separate q, k, v matrices and biases joined on dim 0 into `in_proj_*`.

    Task vectors are linear, so joining before or after the difference is the same.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    fused: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _SPLIT.match(name)
        if match is None:
            fused[name] = tensor
            continue
        kind = "in_proj_bias" if match[3].endswith("bias") else "in_proj_weight"
        parts.setdefault(match[1] + kind, {})[match[2]] = tensor
    for name, split in parts.items():
        missing = [letter for letter in "qkv" if letter not in split]
        shapes = {letter: tuple(tensor.shape) for letter, tensor in split.items()}
        if missing or name in fused or len(set(shapes.values())) > 1:
            raise InputError(
                f"`{path}`: cannot join q, k, v into `{name}`: found "
                f"{shapes}{' and the fused one' * (name in fused)}, expected q, k and v of one shape; the file is "
                "incomplete or mixes two layouts"
            )
        fused[name] = torch.cat([split[letter] for letter in "qkv"])
    return fused
