"""CLIP's image towers by architecture: open_clip's names, or a configuration file in its format."""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.limits import read_json
from adaptive_merge.weights.manifest import Manifest
from adaptive_merge.weights.open_clip import statement_of
from adaptive_merge.weights.reader import check_shapes

__all__ = ["build_tower", "read_architecture"]


def read_architecture(name: str) -> Manifest:
    """An architecture by open_clip's name (`ViT-B-32-quickgelu`), or from a `.json` file in its format.

    The file is a model configuration, or an `open_clip_config.json`, whose normalisation is then taken over.

    Raises:
        MissingFileError, InputError: unknown name or file, or no plain vision transformer.
    """
    # open_clip would look up other names, such as hf-hub:…, on the network.
    known = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    config = read_json(Path(name)) if name.endswith(".json") else known
    if config is None:
        near = did_you_mean(name, open_clip.list_models())
        raise InputError(
            f"open_clip knows no architecture {name!r}{near}; OpenAI's weights are `…-quickgelu`. Nothing is looked up "
            "on a hub: for another tower give a .json file in open_clip's format"
        )
    architecture = statement_of(config, name)
    sizes = {**architecture.architecture(), "embed_dim": architecture.embed_dim}
    missing = [size for size, value in sizes.items() if value is None]
    if missing:
        raise InputError(f"`{name}`: the configuration does not state {', '.join(missing)} of the tower; add it")
    return architecture


def build_tower(architecture: Manifest, tensors: dict[str, Tensor], source: str) -> VisionTransformer:
    """The tower with these tensors (shared, not copied), in evaluation mode, without gradients.

    Args:
        architecture: complete but for the normalisation, which is OpenAI's by default.
        source: how messages call the tensors.

    Raises:
        InputError: a tensor is missing, extra or of another shape.
    """
    if architecture.width % architecture.heads:
        raise InputError(f"`{source}`: {architecture.heads} heads do not divide the width {architecture.width}")
    with torch.device("meta"):
        tower = VisionTransformer(
            *(architecture.image_size, architecture.patch, architecture.width, architecture.layers, architecture.heads),
            (architecture.mlp_width + 0.5) / architecture.width,  # open_clip rounds the product down
            output_dim=architecture.embed_dim,
            act_layer=QuickGELU if architecture.quick_gelu else nn.GELU,
        )
    expected = {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}
    check_shapes(tensors, expected, source)
    tower.load_state_dict(tensors, assign=True)
    tower.image_mean = architecture.mean or open_clip.OPENAI_DATASET_MEAN
    tower.image_std = architecture.std or open_clip.OPENAI_DATASET_STD
    return tower.requires_grad_(False).eval()
