"""A routed model in one sealed file: merged tower, what routes need of the experts, heads; tensors and plain settings.

Nothing in it is code. The loader makes adapters and heads of this package's own classes alone, by name.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from adaptive_merge import adapters as adapter_kinds
from adaptive_merge.adapters.base import Adapter
from adaptive_merge.adapters.heads import CosineHead, LinearHead
from adaptive_merge.adapters.route import Route
from adaptive_merge.coefficients.linear import Fixed
from adaptive_merge.engine.identity import settings
from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.engine.typed import ListOf
from adaptive_merge.engine.unknown import predict
from adaptive_merge.errors import InputError
from adaptive_merge.export.tower import describe_tower
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.sealed import load_sealed, save_sealed
from adaptive_merge.suites.embedded_tower import build_encoder
from adaptive_merge.weights.clip import build_tower
from adaptive_merge.weights.manifest import Manifest

__all__ = ["RoutedModule", "load_module", "save_module"]

FORMAT: Final = "adaptive_merge.module"
VERSION: Final = 1
_HEADS: Final = {kind.__name__: kind for kind in (CosineHead, LinearHead)}


class RoutedModule(nn.Module):
    """A loaded model: `forward` gives a task's logits, `predict` takes images whose task is not known as well.

    Args:
        model: tower, adapters and heads.
        recipe: how it was made.
    """

    def __init__(self, model: AdaptedModel, recipe: str) -> None:
        super().__init__()
        self.model, self.recipe, self.tasks = model, recipe, model.tasks

    def forward(self, task: str, images: Tensor) -> Tensor:
        """Logits [B, C] of a task for images [B, 3, H, W], uint8 or normalised."""
        return self.model(task, images).logits

    def predict(self, images: Tensor, task: str | None = None) -> tuple[list[str], list[Tensor]]:
        """The task and the classes of each image, see `AdaptiveMerge.predict`."""
        return predict(self.model, images, task, self.recipe)


def save_module(module: AdaptiveMerge, path: Path) -> None:
    """Write the model with all its adapters.

    Raises:
        InputError: an adapter or head by code of its own, or with settings that are no plain values.
    """
    model, backbone = module.model, module.model.backbone
    tensors = {f"tower.{name}": value for name, value in backbone.merged_state_dict().items()}
    header: dict[str, Any] = {"version": VERSION, "recipe": module.recipe, "tasks": list(module.tasks)}
    header |= {"tower": _describe(backbone, module.recipe), "names": list(backbone.task_vectors.names)}
    header |= {"adapters": [], "heads": []}
    for number, adapter in enumerate(model.adapters):
        header["adapters"].append(_plain(adapter))
        parts = {"state": adapter.state_dict()}
        if isinstance(adapter, Route):
            parts["frozen"] = adapter.tensors(backbone.task_vectors)
        tensors |= {f"adapters.{number}.{part}.{name}": v for part, own in parts.items() for name, v in own.items()}
    for number, task in enumerate(module.tasks):
        head = model.heads[task]
        if type(head) not in _HEADS.values():
            raise InputError(f"the head of task {task!r} is a {type(head).__name__}, by code of its own")
        header["heads"].append(type(head).__name__)
        tensors |= {f"heads.{number}.{name}": value for name, value in head.state_dict().items()}
    copies = {name: value.detach().clone() for name, value in tensors.items()}  # files refuse shared storage
    save_sealed(path, copies, {FORMAT: json.dumps(header)})


def load_module(path: str | Path, backbone: nn.Module | None = None) -> RoutedModule:
    """The model of a file of `adaptive-merge export --format module`, or of its folder; needs no expert.

    Args:
        path: the folder, or its `module.safetensors`.
        backbone: structure of the tower, where it is neither a plain CLIP vision transformer nor the embedded suite's.

    Raises:
        MissingFileError: no such file.
        InputError: changed since it was written, not such a file, or a tower that has to be given.
    """
    path = Path(path) / "module.safetensors" if Path(path).is_dir() else Path(path)
    tensors, metadata = load_sealed(path)
    try:
        header = json.loads(metadata[FORMAT])
        if header["version"] != VERSION:
            raise InputError(f"`{path}`: version {header['version']!r}; read it with the version that wrote it")
        return RoutedModule(_rebuild(header, tensors, backbone, str(path)), header["recipe"]).eval()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"`{path}`: not a module file of this program ({error!r}); export it again") from error


def _rebuild(header: dict[str, Any], tensors: dict[str, Tensor], backbone: nn.Module | None, path: str) -> AdaptedModel:
    weights, tasks = _under(tensors, "tower."), header["tasks"]
    tower = _tower(header["tower"], weights, path) if backbone is None else backbone
    names = header["names"]
    layout = Layout(tuple(names), tuple(tuple(weights[name].shape) for name in names))
    merged = torch.cat([weights[name].flatten() for name in names])
    nothing = torch.zeros(1).expand(len(tasks), layout.numel)  # takes no memory
    buffers = {name: value for name, value in weights.items() if name not in names}
    bank = TaskVectors(tasks, layout, merged, nothing, buffers)
    heads = {
        task: _HEADS[kind](own["weight"], own.get("bias"))
        for number, (task, kind) in enumerate(zip(tasks, header["heads"], strict=True))
        for own in [_under(tensors, f"heads.{number}.")]
    }
    model = AdaptedModel(MergedBackbone(tower, bank, Fixed(0.0), "streamed"), heads)
    made = []
    for number, (name, arguments) in enumerate(header["adapters"]):
        adapter = getattr(adapter_kinds, name)(**arguments)
        frozen = _under(tensors, f"adapters.{number}.frozen.")
        _place(adapter, model, frozen)
        adapter.load_state_dict(_under(tensors, f"adapters.{number}.state."))
        made.append(adapter)
    model.adapters = ListOf(made)
    return model.requires_grad_(False)


def _place(adapter: Adapter, model: AdaptedModel, frozen: dict[str, Tensor]) -> None:
    if isinstance(adapter, Route):
        adapter.tasks = model.tasks
        adapter.place(model.backbone)
        adapter.frozen = frozen
    else:
        adapter.bind(model.backbone, model.heads)


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _plain(adapter: Adapter) -> tuple[str, dict[str, Any]]:
    """Class and arguments of an adapter of this package."""
    name = type(adapter).__name__
    if getattr(adapter_kinds, name, None) is not type(adapter):
        raise InputError(f"{name} is code of its own, which a module file does not hold")
    arguments = settings(adapter)
    json.dumps(arguments)
    return name, arguments


def _describe(backbone: MergedBackbone, recipe: str) -> dict[str, Any] | None:
    """The tower, where the loader can build it; None: it has to be given."""
    try:
        return asdict(describe_tower(backbone, recipe))
    except InputError:
        ours = {name: tuple(value.shape) for name, value in build_encoder().named_parameters()}
        same = ours == dict(zip(backbone.task_vectors.names, backbone.task_vectors.layout.shapes))
        mean, std = (getattr(backbone.skeleton, name, None) for name in ("image_mean", "image_std"))
        return {"embedded": True, "mean": mean, "std": std} if same else None


def _tower(facts: dict[str, Any] | None, weights: dict[str, Tensor], path: str) -> nn.Module:
    if facts is None:
        raise InputError(f"`{path}`: its tower is code of its own; give its structure as load_module(path, backbone)")
    if facts.get("embedded"):
        tower = build_encoder()
        tower.image_mean, tower.image_std = facts["mean"], facts["std"]
        return tower
    return build_tower(Manifest(**facts), weights, path)
