"""Hugging Face's CLIP names to open_clip's and back; folders, shards and hub ids. transformers is not needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.weights.manifest import Facts, triple

__all__ = ["MARKER", "facts_of_folder", "from_huggingface", "read_json", "snapshot", "to_huggingface"]

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
# CLIPVisionConfig's own defaults: older folders write only what differs from them.
_DEFAULTS: Final = {
    "hidden_act": "quick_gelu",
    "num_attention_heads": 12,
    "image_size": 224,
    "layer_norm_eps": 1e-5,
}
_ACTIVATIONS: Final = {"quick_gelu": True, "gelu": False}
_SETTINGS: Final = ("config.json", "preprocessor_config.json", "open_clip_config.json")
_SAFETENSORS: Final = ("model*.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors")
_PICKLES: Final = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin")


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
    single = {ours: theirs for theirs, ours in _SINGLE.items()}
    block = {ours: theirs for theirs, ours in _BLOCK.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        match = _RESBLOCK.match(name)
        if name == "proj":
            found[PROJECTION] = tensor.t().contiguous()
        elif match and match[2] == "attn.in_proj":
            for letter, part in zip("qkv", tensor.chunk(3)):
                found[f"{prefix}encoder.layers.{match[1]}.self_attn.{letter}_proj.{match[3]}"] = part.contiguous()
        elif match and match[2] in block:
            found[f"{prefix}encoder.layers.{match[1]}.{block[match[2]]}.{match[3]}"] = tensor
        elif name in single or stem in single:
            found[prefix + (single[name] if name in single else f"{single[stem]}.{kind}")] = tensor
        else:
            raise InputError(f"tensor `{name}` has no place in a Hugging Face CLIP vision model; export as open_clip")
    return found


def facts_of_folder(folder: Path) -> Facts:
    """What `config.json` and `preprocessor_config.json` say of the vision tower."""
    path = folder / "config.json"
    config = read_json(path)
    vision = config.get("vision_config", config)
    vision = {**_DEFAULTS, **vision} if isinstance(vision, dict) else dict(_DEFAULTS)
    activation = vision["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise InputError(
            f"`{path}`: hidden_act {activation!r}, expected one of {sorted(_ACTIVATIONS)}; open_clip has no such "
            "activation"
        )
    if vision["layer_norm_eps"] != _DEFAULTS["layer_norm_eps"]:
        raise InputError(f"`{path}`: layer_norm_eps {vision['layer_norm_eps']!r}, expected 1e-05 as in open_clip")
    facts = Facts(quick_gelu=_ACTIVATIONS[activation])
    facts.heads, facts.image_size = vision["num_attention_heads"], vision["image_size"]
    if (folder / "preprocessor_config.json").is_file():
        preprocess = read_json(folder / "preprocessor_config.json")
        facts.mean, facts.std = triple(preprocess.get("image_mean")), triple(preprocess.get("image_std"))
    return facts


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or one readable error."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"`{path}`: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"`{path}`: not readable as JSON ({error}); copy or download it again") from error
    if not isinstance(found, dict):
        raise InputError(f"`{path}`: expected a JSON object, found {type(found).__name__}")
    return found


def snapshot(repository: str, revision: str | None) -> Path:
    """The local folder of a hub repository: weights as safetensors if there are any, else as pickles.

    `HF_HUB_OFFLINE=1` is honoured: only what is in the cache is used.
    """
    from huggingface_hub import snapshot_download

    try:
        for patterns in (_SAFETENSORS, _PICKLES):
            folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[*_SETTINGS, *patterns]))
            if any(path for pattern in patterns for path in folder.glob(pattern)):
                return folder
    except Exception as error:
        raise MissingFileError(
            f"`{repository}` (revision {revision or 'main'}): cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); check the "
            "name and the network, or download the folder and give its path"
        ) from error
    raise MissingFileError(f"`{repository}`: no model.safetensors, open_clip_model.safetensors or .bin weights in it")
