"""The adapted model as ordinary modules and tensors: what is shared, what a task adds, what of it can be folded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn

from adaptive_merge.adapters.heads import Head
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.weights.manifest import Manifest
from adaptive_merge.weights.open_clip_names import architecture_of, expected_shapes

__all__ = ["Folded", "GraphModel", "check_task", "describe_tower", "fold", "image_size", "plain_tower", "reference"]


@dataclass(frozen=True)
class Folded:
    """A merge as plain tensors and frozen heads.

    Args:
        weights: the tower's state dict; with a task, its tinted layer in it.
        heads: task → head.
        left: the adapters that no plain tower and head can express, each with its reason.
    """

    weights: dict[str, Tensor]
    heads: dict[str, Head]
    left: tuple[str, ...] = ()


@torch.no_grad()
def fold(module: AdaptiveMerge, task: str | None) -> Folded:
    """A task's own model, with all its adapters folded in that can be; or what all tasks share, with all heads."""
    model = module.model
    if task is not None:
        check_task(module, task)
    weights: Mapping[str, Tensor] = model.backbone.merged_state_dict()
    heads = {name: head for name, head in model.heads.items() if task in (None, name)}
    left = []
    for adapter in model.adapters:
        if task is None and adapter.needs_task:
            continue  # what a task has of its own
        try:
            pairs = {name: adapter.fold(name, weights, head) for name, head in heads.items() if name in model.tasks}
        except InputError as error:
            left.append(str(error))
            continue
        heads |= {name: head for name, (_, head) in pairs.items()}
        weights = next(iter(pairs.values()))[0]
    return Folded({name: value.detach().clone() for name, value in weights.items()}, heads, tuple(left))


def check_task(module: AdaptiveMerge, task: str) -> None:
    """InputError where the module has no such task."""
    if task not in module.tasks:
        raise InputError(f"this run has no task {task!r}{did_you_mean(task, module.tasks)}")


def plain_tower(backbone: MergedBackbone, weights: Mapping[str, Tensor]) -> nn.Module:
    """The backbone's own structure with these weights: an ordinary module in evaluation mode, without gradients."""
    tower = copy.deepcopy(backbone.skeleton)
    for name, buffer in backbone.constants.items():
        owner, _, leaf = name.rpartition(".")
        setattr(tower.get_submodule(owner), leaf, buffer.detach().cpu().clone())
    tower.load_state_dict({name: value.detach().cpu() for name, value in weights.items()}, assign=True)
    return tower.requires_grad_(False).eval()


class GraphModel(nn.Module):
    """The module's own forward in evaluation mode, with the merged weights as ordinary parameters.

    Args:
        module: an adapted module; it is read, not changed.
        task: one of its tasks; None: what all tasks share.
    """

    def __init__(self, module: AdaptiveMerge, task: str | None) -> None:
        super().__init__()
        self.task, self.model = task, module.model
        backbone = module.model.backbone
        self.tower = plain_tower(backbone, backbone.merged_state_dict()).to(backbone.device)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [U, C] of a task, or shared features [B, d], of normalised images [B, 3, H, W]."""
        weights = dict(self.tower.named_parameters())
        if self.task is None:
            return self.model.shared_features(images, weights)
        return self.model(self.task, images, weights).logits


def image_size(backbone: MergedBackbone) -> tuple[int, int]:
    """Height and width, in pixels, of the images that the backbone takes."""
    size = getattr(backbone.skeleton, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple | list) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise InputError("the backbone does not say its image size; set `backbone.image_size` to its height and width")


def describe_tower(backbone: MergedBackbone, source: str) -> Manifest:
    """The tower's identity where it is a plain CLIP vision transformer, as open_clip and Hugging Face build it.

    Raises:
        InputError: it is not; the message says what keeps it apart and what to export instead.
    """
    tower = backbone.skeleton
    reason = _not_plain(tower)
    if reason:
        raise InputError(
            f"`{source}`: this backbone is not a plain CLIP vision transformer: {reason}; export it as onnx or "
            "safetensors instead"
        )
    shapes = {name: parameter for name, parameter in tower.named_parameters()}
    facts = architecture_of(shapes, source)
    return Manifest(
        **facts,
        heads=tower.transformer.resblocks[0].attn.num_heads,
        quick_gelu=isinstance(tower.transformer.resblocks[0].mlp.gelu, QuickGELU),
        projection="present",
        source=source,
        format="adaptive_merge export",
        sha256="",
        dtype="float32",
        mean=_triple(tower, "image_mean"),
        std=_triple(tower, "image_std"),
    )


def _triple(tower: nn.Module, name: str) -> tuple[float, float, float] | None:
    values = getattr(tower, name, None)
    return tuple(float(value) for value in values) if values is not None else None


def _not_plain(tower: nn.Module) -> str | None:
    if not isinstance(tower, VisionTransformer):
        return f"it is a {type(tower).__name__}"
    if not isinstance(tower.conv1, nn.Conv2d):
        return "its patch embedding `conv1` is not one convolution"
    settings = {"pool_type": "tok", "final_ln_after_pool": False, "attn_pool": None, "output_tokens": False}
    for name, wanted in settings.items():
        if getattr(tower, name) != wanted:
            return f"its {name} is {getattr(tower, name)!r}, expected {wanted!r}"
    if tower.image_size[0] != tower.image_size[1]:
        return f"its images are not square: {tower.image_size}"
    activations = {type(block.mlp.gelu) for block in tower.transformer.resblocks}
    if len(activations) != 1 or not activations <= {QuickGELU, nn.GELU}:
        return f"its activations are {sorted(kind.__name__ for kind in activations)}, expected GELU or QuickGELU"
    shapes = {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}
    if "proj" not in shapes:
        return "it has no projection `proj`"
    expected = expected_shapes(**architecture_of(dict(tower.named_parameters()), "the backbone"))
    odd = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if odd:
        return f"tensor `{odd[0]}`: expected {expected.get(odd[0])}, found {shapes.get(odd[0])}"
    epsilons = {part.eps for part in tower.modules() if isinstance(part, nn.LayerNorm)}
    return None if epsilons == {1e-5} else f"its LayerNorms have eps {sorted(epsilons)}, expected 1e-05"


@torch.no_grad()
def reference(module: AdaptiveMerge, task: str | None, images: Tensor, logits: bool) -> Tensor:
    """What the module itself says of normalised images: features [B, d], or a task's logits [U, C]."""
    model, backbone = module.model, module.model.backbone
    # As plain tensors: a rule may draw its state at random where it is not in evaluation mode.
    merged = module.merged_state_dict(None if logits else task)
    weights = {name: value for name, value in merged.items() if name not in backbone.constants}
    images = images.to(backbone.device)
    if task is None:
        return model.shared_features(images, weights).cpu()
    return (model(task, images, weights).logits if logits else backbone(images, weights)).cpu()
