"""CLIP's image towers by architecture: open_clip's names, or a configuration file in its format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import open_clip
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.weights.huggingface import read_json
from adaptive_merge.weights.manifest import triple
from adaptive_merge.weights.open_clip_names import architecture_of
from adaptive_merge.weights.reader import check_shapes

__all__ = ["Architecture", "read_architecture"]

_PLAIN: Final = frozenset({"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"})
_NEUTRAL: Final = (None, False, 0, "", "tok", "learnable", {}, [])


@dataclass(frozen=True)
class Architecture:
    """One CLIP image tower: sizes in tokens, channels and pixels, its activation, and its normalisation."""

    name: str
    width: int
    layers: int
    heads: int
    patch: int
    image_size: int
    mlp_ratio: float
    embed_dim: int
    quick_gelu: bool
    mean: tuple[float, float, float] = open_clip.OPENAI_DATASET_MEAN
    std: tuple[float, float, float] = open_clip.OPENAI_DATASET_STD

    def build(self, tensors: dict[str, Tensor], source: str) -> VisionTransformer:
        """The tower with these tensors (shared, not copied), in evaluation mode, without gradients.

        Raises:
            InputError: the tensors are of another architecture; one is missing, extra or of another shape.
        """
        found = architecture_of(tensors, source)
        ours = {"width": self.width, "layers": self.layers, "patch": self.patch, "image_size": self.image_size}
        odd = [f"{fact}: expected {ours[fact]}, found {found[fact]}" for fact in ours if ours[fact] != found[fact]]
        if odd:
            raise InputError(
                f"`{source}`: not of architecture {self.name}: {'; '.join(odd)}; name the architecture of these "
                "weights, or give the weights of this one"
            )
        with torch.device("meta"):
            tower = VisionTransformer(
                self.image_size,
                self.patch,
                self.width,
                self.layers,
                self.heads,
                self.mlp_ratio,
                output_dim=self.embed_dim,
                act_layer=QuickGELU if self.quick_gelu else nn.GELU,
            )
        expected = {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}
        check_shapes(tensors, expected, f"{source} (architecture {self.name})")
        tower.load_state_dict(tensors, assign=True)
        tower.image_mean, tower.image_std = self.mean, self.std
        return tower.requires_grad_(False).eval()


def read_architecture(name: str) -> Architecture:
    """An architecture by open_clip's name (`ViT-B-32-quickgelu`), or from a `.json` file in its format.

    The file is a model configuration, or an `open_clip_config.json`, whose normalisation is then taken over.

    Raises:
        MissingFileError, InputError: unknown name or file, or no plain vision transformer.
    """
    preprocess: dict[str, Any] = {}
    if name.endswith(".json"):
        config = read_json(Path(name))
        preprocess = config.get("preprocess_cfg", {})
        config = config.get("model_cfg", config)
    else:
        config = open_clip.get_model_config(name)
        if config is None:
            near = did_you_mean(name, open_clip.list_models())
            raise InputError(f"open_clip knows no architecture {name!r}{near}; OpenAI's weights are `…-quickgelu`")
    vision = config.get("vision_cfg", {})
    odd = {key: value for key, value in vision.items() if key not in _PLAIN and value not in _NEUTRAL}
    needed = {"layers", "width", "patch_size", "image_size"}
    if odd or not needed <= set(vision) or not isinstance(vision["layers"], int):
        raise InputError(
            f"architecture {name!r} has {odd or vision}, expected a plain CLIP vision transformer (layers, width, "
            "patch_size, image_size); towers of timm, ResNets and other poolings cannot be merged here"
        )
    return Architecture(
        name=name,
        width=vision["width"],
        layers=vision["layers"],
        heads=vision["width"] // vision.get("head_width", 64),
        patch=vision["patch_size"],
        image_size=vision["image_size"],
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        embed_dim=config["embed_dim"],
        quick_gelu=bool(config.get("quick_gelu", False)),
        mean=triple(preprocess.get("mean")) or open_clip.OPENAI_DATASET_MEAN,
        std=triple(preprocess.get("std")) or open_clip.OPENAI_DATASET_STD,
    )
