"""A tiny CLIP of the true architecture, and whole-pickled look-alikes of the published checkpoint files."""

from __future__ import annotations

import pickle
import warnings

import torch
from open_clip.model import CLIP

torch.set_num_threads(1)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOWER = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 2, "width": 64, "patch_size": 16, "image_size": 32, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}
FORMATS = ("zip", "legacy", "pickle", "pickle-2")


def build_clip(*, quick_gelu: bool = True, seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    model = CLIP(**TOWER, quick_gelu=quick_gelu).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn_like(tensor))
    return model


def write(root, path, kind: str):
    """Save an object whole, as torch.save or pickle.dump of any age would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind.startswith("pickle"):
            path.write_bytes(pickle.dumps(root, protocol=2 if kind == "pickle-2" else 4))
        else:
            torch.save(root, path, _use_new_zipfile_serialization=kind == "zip")
    return path


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = mean, std


class Compose:
    def __init__(self, transforms):
        self.transforms = transforms


class ImageEncoder(torch.nn.Module):
    pass


class ClassificationHead(torch.nn.Linear):
    pass


def assert_same(found, expected) -> None:
    """Same names in the same order, same bits."""
    assert list(found) == list(expected)
    different = [name for name in expected if not torch.equal(found[name], expected[name].detach())]
    assert different == []
