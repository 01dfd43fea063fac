"""Hugging Face folders and hub ids. transformers is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.limits import read_json
from adaptive_merge.weights.folders import Folder
from adaptive_merge.weights.huggingface_names import from_huggingface, to_huggingface
from adaptive_merge.weights.manifest import Manifest, triple, whole

__all__ = ["HuggingFace", "from_huggingface", "snapshot", "to_huggingface"]

# CLIPVisionConfig's own defaults: older folders write only what differs from them.
_DEFAULTS: Final = {"hidden_act": "quick_gelu", "num_attention_heads": 12, "image_size": 224, "layer_norm_eps": 1e-5}
_CLASSES: Final = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")
_TYPES: Final = ("clip", "clip_vision_model")
_ACTIVATIONS: Final = {"quick_gelu": True, "gelu": False}
_SETTINGS: Final = ("config.json", "preprocessor_config.json", "open_clip_config.json", "adapter_config.json")
_SAFETENSORS: Final = (
    *("model*.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors"),
    "adapter_model.safetensors",
)
_PICKLES: Final = (
    *("pytorch_model*.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin"),
    "adapter_model.bin",
)


class HuggingFace(Folder):
    """A folder of `CLIPModel`, `CLIPVisionModel` or `CLIPVisionModelWithProjection`."""

    expects = "config.json with model.safetensors (Hugging Face)"
    format, config, names = "huggingface", "config.json", ("model.safetensors", "pytorch_model.bin")

    def statement(self, folder: Path) -> Manifest:
        path = folder / self.config
        config = read_json(path)
        _check_class(path, config)
        vision = config.get("vision_config", config)
        vision = {**_DEFAULTS, **vision} if isinstance(vision, dict) else dict(_DEFAULTS)
        activation = vision["hidden_act"]
        if not isinstance(activation, str) or activation not in _ACTIVATIONS:
            raise InputError(
                f"`{path}`: hidden_act {activation!r}, expected one of {sorted(_ACTIVATIONS)}; open_clip has no such "
                "activation"
            )
        if vision["layer_norm_eps"] != _DEFAULTS["layer_norm_eps"]:
            raise InputError(f"`{path}`: layer_norm_eps {vision['layer_norm_eps']!r}, expected 1e-05 as in open_clip")
        preprocessor = folder / "preprocessor_config.json"
        preprocess = read_json(preprocessor) if preprocessor.is_file() else {}
        return Manifest(
            str(path),
            heads=whole(vision, "num_attention_heads", path),
            image_size=whole(vision, "image_size", path),
            quick_gelu=_ACTIVATIONS[activation],
            mean=triple(preprocess.get("image_mean")),
            std=triple(preprocess.get("image_std")),
        )


def _check_class(path: Path, config: dict[str, Any]) -> None:
    """Refuse models that do more than CLIP's image tower, or something else: all tensors may fit, and mean another."""
    stated = config.get("architectures") or []
    classes = stated if isinstance(stated, list) else [stated]
    odd = [name for name in classes if name not in _CLASSES]
    kind = config.get("model_type", _TYPES[0])
    if odd or kind not in _TYPES:
        raise InputError(
            f"`{path}`: {f'architectures {odd[0]!r}' if odd else f'model_type {kind!r}'}, expected "
            f"{' or '.join(_CLASSES)}: other models pool or classify in their own way; save the image tower as one of "
            "these"
        )


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
