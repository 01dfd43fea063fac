"""open_clip's folders, and the configuration files of its CLIP models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from adaptive_merge.errors import InputError
from adaptive_merge.limits import read_json
from adaptive_merge.weights.folders import Folder
from adaptive_merge.weights.manifest import Manifest, triple, whole

__all__ = ["OpenClip", "statement_of"]

_PLAIN: Final = frozenset(
    ("layers", "width", "patch_size", "image_size", "head_width", "mlp_ratio", "patch_dropout", "output_tokens")
)
_NEUTRAL: Final = (None, False, 0, "", "tok", "learnable", {}, [])


class OpenClip(Folder):
    """A folder as open_clip pushes it to a hub."""

    expects = "open_clip_config.json with open_clip_model.safetensors (open_clip)"
    format, config = "open_clip", "open_clip_config.json"
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

    def statement(self, folder: Path) -> Manifest:
        return statement_of(read_json(folder / self.config), str(folder / self.config))


def statement_of(config: dict[str, Any], source: str) -> Manifest:
    """What a model's configuration, or an `open_clip_config.json` around it, states of the image tower.

    Raises:
        InputError: it is no plain vision transformer.
    """
    model = config.get("model_cfg", config)
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(vision, dict):
        raise InputError(f"`{source}`: expected model_cfg.vision_cfg, found keys {sorted(config)[:8]}")
    odd = {key: value for key, value in vision.items() if key not in _PLAIN and value not in _NEUTRAL}
    if odd or not isinstance(vision.get("layers"), int):
        raise InputError(
            f"`{source}`: vision_cfg has {odd or {'layers': vision.get('layers')}}, expected a plain CLIP vision "
            "transformer; towers of timm, ResNets and other poolings are not read"
        )
    width, head_width = whole(vision, "width", source, 768), whole(vision, "head_width", source, 64)
    size, ratio = vision.get("image_size"), vision.get("mlp_ratio", 4.0)
    if width % head_width or not isinstance(ratio, int | float) or not 0 < width * ratio < 1 << 24:
        raise InputError(
            f"`{source}`: vision_cfg: width {width}, head_width {head_width} and mlp_ratio {ratio!r:.60} "
            "do not fit each other; correct the configuration"
        )
    preprocess = config.get("preprocess_cfg")
    preprocess = preprocess if isinstance(preprocess, dict) else {}
    return Manifest(
        source,
        width=width,
        layers=whole(vision, "layers", source),
        patch=whole(vision, "patch_size", source),
        image_size=whole(vision, "image_size", source) if isinstance(size, int) else None,
        mlp_width=int(width * ratio),
        embed_dim=whole(model, "embed_dim", source),
        heads=width // head_width,
        quick_gelu=bool(model.get("quick_gelu", False)),
        mean=triple(preprocess.get("mean")),
        std=triple(preprocess.get("std")),
    )
