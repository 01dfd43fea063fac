"""Before the first step: a start's solution, from the run's own file or solved from the stream, and the bank around it.

θ = θ* + Σₜ λₜ (θₜ − θ*) with λ from 0: what learns goes on from the solution θ*. The pre-trained view stays θ₀.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine import identity
from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.sealed import load_sealed, save_sealed
from adaptive_merge.starts.base import Problem, Solution, Start, Store
from adaptive_merge.starts.store import FileStore, SharedStore

__all__ = ["FILE", "PARTIAL", "Begun", "begin", "load_begun", "rebased"]

FILE: Final = "start.safetensors"
PARTIAL: Final = "start.partial.safetensors"
_KEY: Final = "adaptive_merge.start"
_DECIDES: Final = re.compile(r"start\b|transform \d|coefficients\b|head of task")


@dataclass(frozen=True)
class Begun:
    """What a start has given a run.

    Args:
        weights: θ* [P].
        anchor: the merge that it was solved from, [P].
        buffers: those that were estimated anew.
        record: kind, settings, images by task, seconds and the choice of settings, as `results.json` keeps them.
        first: task → the class that the anchor predicts for each of this process's images of the start, int32, where
            every image is to be predicted before it is used; with their numbers, int64.
    """

    weights: Tensor
    anchor: Tensor
    buffers: Mapping[str, Tensor]
    record: Mapping[str, Any]
    first: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def begin(
    start: Start,
    model: AdaptedModel,
    experts: TaskVectors,
    trainer: pl.Trainer,
    parts: Mapping[str, Any],
    folder: Path | None = None,
) -> Begun:
    """Solve a start from the trainer's stream, or read what this run has solved before.

    Args:
        start: how.
        model: merged as its transforms and coefficients say: the anchor.
        experts: the bank before any transform, of the tasks that are merged.
        trainer: with a `TaskStream`.
        parts: identity of the start and of the anchor's transforms and coefficients.
        folder: where the solution is kept, and after each block what is solved so far; None: nowhere.

    Raises:
        InputError: no `TaskStream`; a file of another start.
    """
    stream = getattr(trainer, "datamodule", None)
    if not isinstance(stream, TaskStream):
        raise InputError("a start is solved from unlabelled images: give the trainer a TaskStream as its datamodule")
    made_of = _identity(parts, experts, stream)
    if folder and (folder / FILE).is_file():
        return load_begun(folder / FILE, experts, made_of)
    began = time.perf_counter()
    problem = _problem(model, experts, trainer, stream, folder)
    first = _first(model, problem, stream) if stream.protocol.one_pass else {}
    solution = start.solve(problem)
    if trainer.world_size > 1:
        dist.broadcast(solution.weights, 0)
    record = _record(start, solution, stream, experts.tasks, time.perf_counter() - began)
    buffers = {name: value.cpu() for name, value in solution.buffers.items()}
    begun = Begun(solution.weights.cpu(), problem.anchor.cpu(), buffers, record, first)
    if folder and trainer.is_global_zero:
        _save(folder, begun, made_of)
    return begun


def rebased(experts: TaskVectors, begun: Begun) -> TaskVectors:
    """The bank around θ*: θ* and θₜ − θ*, of the experts' dtype."""
    return experts.around(begun.weights, begun.buffers)


def load_begun(path: Path, experts: TaskVectors, made_of: Mapping[str, Any] | None = None) -> Begun:
    """What a run keeps of its start.

    Args:
        path: of the file.
        experts: the bank that it belongs to.
        made_of: what it has to be made of; None: whatever it is.

    Raises:
        MissingFileError, InputError: there is none; damaged, or of another start.
    """
    tensors, metadata = load_sealed(path)
    header = json.loads(metadata.get(_KEY, "{}"))
    if tensors.get("weights", torch.empty(0)).shape != experts.pretrained.shape:
        raise InputError(f"{path}: not the start of a run over these experts; start the run anew")
    for name, value in (made_of or {}).items():
        if header["identity"].get(name) != value:
            raise InputError(
                f"{path}: the start was solved with another {name}; go on with the settings that it was solved with, "
                "or start the run anew (--run.if_exists overwrite)"
            )
    buffers = {name[7:]: value for name, value in tensors.items() if name.startswith("buffer.")}
    return Begun(tensors["weights"], tensors["anchor"], buffers, header["record"])


def _save(folder: Path, begun: Begun, made_of: Mapping[str, Any]) -> None:
    tensors = {"weights": begun.weights, "anchor": begun.anchor}
    tensors |= {f"buffer.{name}": value for name, value in begun.buffers.items()}
    save_sealed(folder / FILE, tensors, {_KEY: json.dumps({"identity": made_of, "record": begun.record})})
    (folder / PARTIAL).unlink(missing_ok=True)


def _identity(method: Mapping[str, Any], experts: TaskVectors, stream: TaskStream) -> dict[str, Any]:
    """What a solution follows from; JSON."""
    seen = {task: stream.opening(task) for task in experts.tasks}
    parts = {
        **{name: value for name, value in method.items() if _DECIDES.match(name)},
        "experts": experts.fingerprint,
        **{f"images of task {task!r}": stream.images[task].fingerprint for task in experts.tasks},
        **{f"choice of images of task {task!r}": _digest(index) for task, index in seen.items()},
    }
    return dict(json.loads(json.dumps(parts)))


def _problem(
    model: AdaptedModel, experts: TaskVectors, trainer: pl.Trainer, stream: TaskStream, folder: Path | None
) -> Problem:
    backbone, device = model.backbone, trainer.strategy.root_device
    # Not sharded yet: each process merges from what it has.
    anchor = backbone.placement.combine(backbone.coefficients, backbone.coefficients.settled())
    complete = TaskVectors(
        experts.tasks, experts.layout, experts.pretrained, experts.vectors, backbone.constants, experts.own
    )
    images = {task: _Normalised(stream, task, backbone) for task in experts.tasks}
    store: Store | None = FileStore(folder / PARTIAL) if folder else None
    if isinstance(store, FileStore) and trainer.world_size > 1:
        store = SharedStore(store, trainer.is_global_zero, trainer.strategy.broadcast)

    def progress(done: int, total: int) -> None:
        for callback in getattr(trainer, "callbacks", ()):
            if hasattr(callback, "on_start_progress"):
                callback.on_start_progress(trainer, done, total)

    return Problem(
        backbone.skeleton,
        complete,
        anchor.to(device),
        images,
        {task: model.heads[task] for task in experts.tasks},
        _sum_over_processes if trainer.world_size > 1 else lambda tensor: tensor,
        progress,
        store,
        trainer.global_rank,
        trainer.world_size,
    )


class _Normalised:
    """A task's images of the start on this process, batch by batch, as the tower takes them."""

    def __init__(self, stream: TaskStream, task: str, backbone: MergedBackbone) -> None:
        self.stream, self.task, self.backbone = stream, task, backbone

    def __iter__(self) -> Iterator[Tensor]:
        for _, images in self.stream.start_batches(self.task):
            yield self.backbone.normalise(images)


def _sum_over_processes(tensor: Tensor) -> Tensor:
    total = tensor.contiguous().clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def _first(model: AdaptedModel, problem: Problem, stream: TaskStream) -> dict[str, tuple[Tensor, Tensor]]:
    """What the anchor says of the images before they are used: task → their numbers and classes."""
    weights = problem.experts.layout.unflatten(problem.anchor.to(model.backbone.device))
    predicted: dict[str, tuple[Tensor, Tensor]] = {}
    for task in problem.experts.tasks:
        indices, classes = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.int32)]
        for index, images in stream.start_batches(task):
            logits = model(task, images.to(model.backbone.device), weights, adapted=False).logits
            indices.append(index)
            classes.append(model.heads[task].predict(logits).int().cpu())
        predicted[task] = (torch.cat(indices), torch.cat(classes))
    return predicted


def _record(
    start: Start, solution: Solution, stream: TaskStream, tasks: tuple[str, ...], seconds: float
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "kind": identity.kind(start),
        "settings": dict(start.settings),
        "images": {task: len(stream.opening(task)) for task in tasks},
        "seconds": round(seconds, 3),
    }
    if solution.choice is not None:
        record["choice"] = [
            {
                "settings": {"kind": identity.kind(row.start), **row.start.settings},
                "agreement": round(row.agreement.share, 6),
                "js": round(row.agreement.divergence, 6),
                "chosen": row.start.settings == solution.choice.start.settings,
            }
            for row in solution.choice.table
        ]
    return dict(json.loads(json.dumps(record)))


def _digest(index: Tensor) -> str:
    return hashlib.sha256(index.numpy().tobytes()).hexdigest()
