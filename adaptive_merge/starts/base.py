"""The seam: what a start is given, and what it gives back."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adaptive_merge.adapters.heads import HeadLike
from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["Agreement", "Choice", "Judged", "Problem", "Solution", "Start", "Store"]


class Store(Protocol):
    """Keeps what has been solved so far, so that a start that was stopped goes on.

    The identity names method, settings, bank, anchor and images: see `Problem.identity`.
    """

    def load(self, identity: str) -> tuple[int, dict[str, Tensor]] | None:
        """Blocks done and the tensors after them, as `save` was given them; None where there is nothing."""

    def save(self, identity: str, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace what is kept."""


def _alone(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Problem:
    """What there is to merge, and the unlabelled images to merge it by.

    Args:
        backbone: the tower. Its structure and buffers are read, its weights are not.
        experts: the bank before any transform.
        anchor: weights [P] of a static merge, in the bank's layout; starts work on its device.
        images: task → batches of normalised images [B, …] in floating point; iterated several times, and every
            time the same.
        heads: task → head, or classifier weight [C, d]; for starts and choices that ask for predictions.
        reduce: sums a tensor over all processes.
        progress: is told (blocks done, blocks in all).
        store: keeps what is solved after each block; on all processes or on none.
        rank, world: number of this process and of all; of a task's images it has every `world`-th, from `rank` on.
    """

    backbone: nn.Module
    experts: TaskVectors
    anchor: Tensor
    images: Mapping[str, Iterable[Tensor]]
    heads: Mapping[str, HeadLike] = field(default_factory=dict)
    reduce: Callable[[Tensor], Tensor] = _alone
    progress: Callable[[int, int], None] | None = None
    store: Store | None = None
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.anchor.shape != (self.experts.layout.numel,):
            raise InputError(
                f"`anchor` has shape {tuple(self.anchor.shape)}, expected [{self.experts.layout.numel}]: flat weights "
                "in the layout of the bank"
            )
        missing = [task for task in self.experts.tasks if task not in self.images]
        if missing:
            raise InputError(f"`images` has none for task {missing[0]!r}; give batches of unlabelled images of it")

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The backbone's buffers, those of the bank where it has them, on the anchor's device."""
        own = dict(self.backbone.named_buffers()) | dict(self.experts.buffers)
        return {name: buffer.detach().to(self.anchor.device) for name, buffer in own.items()}

    def buffers_of(self, task: str) -> dict[str, Tensor]:
        """`buffers`, but of a task's expert: BatchNorm's running statistics are every expert's own."""
        own = {name: value.to(self.anchor.device) for name, value in self.experts.buffers_of(task).items()}
        return self.buffers | own

    def tower(self, task: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """`expert`, with all of its buffers."""
        return self.expert(task, names) | self.buffers_of(task)

    def expert(self, task: str, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Some parameters, or all, of a task's expert, in float32 on the anchor's device."""
        bank, device = self.experts, self.anchor.device
        row = bank.vectors[bank.tasks.index(task)]
        where = dict(zip(bank.names, zip(bank.layout.slices, bank.layout.shapes)))
        parts = {name: where[name] for name in (bank.names if names is None else names)}
        return {
            name: (bank.pretrained[part].to(device) + row[part].to(device).float()).view(shape)
            for name, (part, shape) in parts.items()
        }

    def identity(self, start: Start) -> str:
        """What tells a start on this problem from others, the same on all processes; one pass through the images.

        Of the images it has their number and the first batch of each task on each process.
        """
        digests = [_digest(self.batches(task)) for task in self.experts.tasks]
        images = self.reduce(torch.tensor(digests, dtype=torch.float64, device=self.anchor.device))
        anchor = float(self.anchor.double().sum())
        return json.dumps([repr(start), self.experts.fingerprint, anchor, images.tolist()])

    def batches(self, task: str) -> Iterable[Tensor]:
        """A task's batches that are not empty, on the anchor's device."""
        for batch in self.images[task]:
            if not batch.is_floating_point():
                raise InputError(f"`images` of task {task!r} are {batch.dtype}; give normalised images in float32")
            if len(batch):
                yield batch.to(self.anchor.device)


def _digest(batches: Iterable[Tensor]) -> tuple[float, float]:
    """Number of images and hash of the first batch, both whole and small enough to be added up exactly."""
    count, digest = 0, 0
    for batch in batches:
        if not count:
            pixels = batch.detach().float().cpu().contiguous().numpy().tobytes()
            digest = int.from_bytes(hashlib.sha256(pixels).digest()[:5], "little")
        count += len(batch)
    return float(count), float(digest)


class Agreement(NamedTuple):
    """How far two models agree on some images.

    Args:
        share: of the units for which both name the same class, in [0, 1].
        divergence: mean Jensen–Shannon divergence of their predictions, in nats, with the first model's logits scaled
            as it is best for the task; 0 where they are equal.
    """

    share: float
    divergence: float


@dataclass(frozen=True)
class Judged:
    """One row of the table: a start, and how far its models agree with the experts on images they have not seen."""

    start: Start
    agreement: Agreement


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        start: the one that agrees best; see `choose`.
        table: all that were judged, in the order in which they were.
    """

    start: Start
    table: tuple[Judged, ...]


@dataclass(frozen=True)
class Solution:
    """A merged model.

    Args:
        weights: [P], float32, in the bank's layout.
        buffers: the buffers that were estimated anew, such as BatchNorm's running statistics.
        choice: how the settings were chosen, where they were; see `choose`.
    """

    weights: Tensor
    buffers: dict[str, Tensor] = field(default_factory=dict)
    choice: Choice | None = None


class Start(ABC):
    """Merges before the first step, mostly in closed form. Arguments are primitives; they are its settings."""

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """The merged model.

        Raises:
            InputError: a task without an image; a head that is needed and missing.
        """

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, for results and for telling one start from another."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"


def mean_of_experts(bank: TaskVectors, scale: float = 1.0) -> Tensor:
    """θ₀ + scale · mean of τ [P], in float32, one expert at a time."""
    total = torch.zeros_like(bank.pretrained)
    for row in bank.vectors:
        total += row.float()
    return bank.pretrained + scale * total / len(bank.tasks)
