"""The adapted model as ordinary modules and tensors: what is shared, what a task adds, what of it can be folded."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_merge.adapters.base import Adapter
from adaptive_merge.adapters.surgery import BlockSurgery, FeatureSurgery
from adaptive_merge.adapters.tint import Tint
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.weights.manifest import Manifest
from adaptive_merge.weights.open_clip_names import architecture_of, expected_shapes

__all__ = ["Folded", "TaskModel", "check_task", "describe_tower", "fold", "image_size", "plain_tower", "reference"]


@dataclass(frozen=True)
class Folded:
    """A merge as plain tensors.

    Args:
        weights: the tower's state dict; with a task, its tinted layer in it.
        heads: task → (weight [C, d], bias [C] or None), applied to L2-normalised features.
        left: the task's parts that no plain tower can express, each with its reason.
    """

    weights: dict[str, Tensor]
    heads: dict[str, tuple[Tensor, Tensor | None]]
    left: tuple[str, ...] = ()


def fold(module: AdaptiveMerge, task: str | None) -> Folded:
    """The shared merge with all frozen heads; or a task's own model, its tints and tinted head folded in."""
    weights = module.merged_state_dict(task)
    if task is None:
        return Folded(weights, {name: (head, None) for name, head in module.model.heads.items()})
    check_task(module, task)
    head: tuple[Tensor, Tensor | None] = (module.model.heads[task], None)
    left = []
    for adapter in module.model.adapters:
        if isinstance(adapter, Tint) and adapter.layer == "head":
            row = adapter.row(task)
            head = adapter.weight[row].detach(), adapter.bias[row].detach()
        elif reason := _obstacle(adapter, task):
            left.append(reason)
    return Folded(weights, {task: head}, tuple(left))


def _obstacle(adapter: Adapter, task: str) -> str | None:
    """Why an adapter cannot become part of a plain tower and linear head; None where it can."""
    name = type(adapter).__name__
    if isinstance(adapter, FeatureSurgery):
        row = adapter.row(task)
        ups = [adapter.up[row]]
        if isinstance(adapter, BlockSurgery):
            ups += list(adapter.block_up)[row * adapter.depth : (row + 1) * adapter.depth]
        if not any(bool(up.any()) for up in ups):
            return None  # U = 0: the surgery is the identity
        return f"{name} of rank {adapter.rank} has a ReLU between its two matrices, which no layer of the tower has"
    kind = type(adapter)
    if (kind.features, kind.block) == (Adapter.features, Adapter.block) and (
        kind.logits is Adapter.logits or isinstance(adapter, Tint)
    ):
        return None
    return f"{name} changes features, blocks or logits by code of its own"


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


class TaskModel(nn.Module):
    """One task from normalised images [B, 3, H, W] to logits [B, C], with all that the task has of its own.

    Args:
        module: an adapted module; it is copied from, not changed.
        task: one of its tasks.
    """

    def __init__(self, module: AdaptiveMerge, task: str) -> None:
        super().__init__()
        check_task(module, task)
        self.task = task
        self.tower = plain_tower(module.model.backbone, module.merged_state_dict(task))
        self.adapters = copy.deepcopy(module.model.adapters).cpu().requires_grad_(False)
        self.register_buffer("head", module.model.heads[task].detach().cpu().clone())
        if any(isinstance(adapter, Adapter) and type(adapter).block is not Adapter.block for adapter in self.adapters):
            for index, name in enumerate(module.model.backbone.blocks):
                self.tower.get_submodule(name).register_forward_hook(
                    lambda _, __, tokens, index=index: self._edit(index, tokens)
                )

    def _edit(self, index: int, tokens: Tensor) -> Tensor:
        for adapter in self.adapters:
            tokens = adapter.block(self.task, index, tokens)
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of normalised images [B, 3, H, W]."""
        features = self.tower(images)
        for adapter in self.adapters:
            features = adapter.features(self.task, features)
        unit = F.normalize(features, dim=-1)
        logits = unit @ self.head.T
        for adapter in self.adapters:
            logits = adapter.logits(self.task, unit, logits)
        return logits


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
    """What the module itself says of normalised images: features [B, d], or a task's logits [B, C]."""
    images = images.to(module.model.backbone.device)
    if logits and task is not None:
        return module(task, images).cpu()
    backbone = module.model.backbone
    weights = {name: value for name, value in module.merged_state_dict(task).items() if name not in backbone.constants}
    return backbone(images, weights).cpu()
