"""Fixtures: the tiny CLIP, and the classes of the published repositories."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from open_clip.model import CLIP

from weights.checkpoint_helpers import MEAN, STD, ClassificationHead, Compose, ImageEncoder, Normalize, build_clip


@pytest.fixture
def strangers():
    """The classes of the published repositories, importable while a file is written and gone when it is read."""
    homes = {"src": [], "src.modeling": [ImageEncoder, ClassificationHead], "far.transforms": [Normalize, Compose]}
    homes["far"] = []
    before = {kind: kind.__module__ for kinds in homes.values() for kind in kinds}
    for home, kinds in homes.items():
        sys.modules[home] = types.ModuleType(home)
        for kind in kinds:
            kind.__module__ = home
            setattr(sys.modules[home], kind.__name__, kind)
    yield sys.modules
    for home in homes:
        sys.modules.pop(home, None)
    for kind, module in before.items():
        kind.__module__ = module


@pytest.fixture
def clip() -> CLIP:
    return build_clip()


@pytest.fixture
def tower(clip) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in clip.visual.named_parameters()}


@pytest.fixture
def encoder(strangers):
    """`src.modeling.ImageEncoder` around a CLIP without its text transformer, preprocessing and all."""

    def build(model) -> ImageEncoder:
        wrapper = ImageEncoder()
        wrapper.model = model
        if hasattr(model, "transformer"):
            del model.transformer
        wrapper.val_preprocess = Compose(["resize", Normalize(MEAN, STD)])
        return wrapper

    return build
