"""What a step and an evaluation take beside the bank: run on tensors without numbers, while what is alive is counted.

The step is the trainer's own (`Step`), on its own graph, so every method, adapter and objective counts for itself. Only
where it looks at numbers, as masks and maxima over tasks do, layer-wise coefficients and entropy stand in for it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from adaptive_merge import upstream
from adaptive_merge.coefficients.linear import LayerWise
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.engine.step import Batch, Step
from adaptive_merge.objectives.base import Objective
from adaptive_merge.objectives.certainty import Entropy

__all__ = ["Trace", "traced"]


@dataclass(frozen=True)
class Trace:
    """Bytes at the peak, without the bank.

    Args:
        step: of a step; 0 where nothing learns.
        evaluation: of a batch that is scored, with the merge and an expert.
        joint: whether a step is one graph.
        exact: whether step and evaluation themselves were run, and nothing that stands in for them.
    """

    step: int
    evaluation: int
    joint: bool
    exact: bool


class _Alive(upstream.DispatchMode):
    """Counts the bytes of all tensors that operations make while they are alive.

    Args:
        known: what is there before, and counted elsewhere.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        for value in known:
            reference = StorageWeakRef(value.untyped_storage())
            self._held[reference.cdata] = (reference, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self._note(value.untyped_storage())
        return result

    def begin(self) -> None:
        """Count the peak from what is alive now."""
        gc.collect()
        self.peak = 0
        self._settle()

    def _note(self, storage: torch.UntypedStorage) -> None:
        reference = StorageWeakRef(storage)
        if reference.cdata in self._held:
            return
        self._held[reference.cdata] = (reference, storage.nbytes())
        self.now += storage.nbytes()
        if self.now > self.peak:  # only now is it worth a look at who is gone
            self._settle()

    def _settle(self) -> None:
        self._held = {key: entry for key, entry in self._held.items() if not entry[0].expired()}
        self.now = sum(size for _, size in self._held.values())
        self.peak = max(self.peak, self.now)


def traced(
    module: AdaptiveMerge, sizes: Mapping[str, int], scored: int, image: tuple[int, ...], processes: int, autocast: bool
) -> Trace:
    """Trace a module over an outline of its bank; it is of no other use afterwards.

    Args:
        module: its learned parameters lose their numbers.
        sizes: task → images of a step on this process.
        scored: images of an evaluation batch.
        image: shape of one image.
        processes: of the run.
        autocast: whether the tower runs in bfloat16.
    """
    with upstream.shapes_alone(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _hollow(module.train())
        largest = sorted(sizes.items(), key=lambda one: -one[1])
        batch = {task: _batch(count, image) for task, count in largest}
        step, joint, exact = 0, False, True
        alive = _Alive(_banks(module))  # of all, for a step leaves buffers behind
        for stage in module.stages if module.learned else ():
            objective = module.enter(stage)
            joint = module.joins(objective, batch, processes)
            part = batch if joint else dict(list(batch.items())[:2])  # a smaller third takes no more than these
            own, other = (partial(_step, module, one, part, joint) for one in (objective, Entropy()))
            peak, itself = _peak(alive, module, own, other)
            step, exact = max(step, peak), exact and itself
        score = partial(_score, module, next(iter(sizes)), scored, image)
        evaluation, itself = _peak(alive, module, score, score)
        return Trace(step, evaluation, joint, exact and itself)


def _banks(module: AdaptiveMerge) -> list[Tensor]:
    banks = (module.experts, module.model.backbone.task_vectors)
    held = [(bank.pretrained, *bank.buffers.values(), *bank.own.values()) for bank in banks]
    vectors = [(bank.vectors,) if bank.factors is None else bank.factors.named("").values() for bank in banks]
    return [value for values in (*held, *vectors) for value in values]


def _batch(count: int, image: tuple[int, ...]) -> dict[str, Tensor]:
    return {"image": torch.empty(count, *image, dtype=torch.uint8), "index": torch.arange(count)}


def _hollow(module: nn.Module) -> None:
    for part in list(module.modules()):
        for name, value in list(part.named_parameters(recurse=False)):
            if value.requires_grad:
                setattr(part, name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype)))


def _peak(
    alive: _Alive, module: AdaptiveMerge, work: Callable[[], None], instead: Callable[[], None]
) -> tuple[int, bool]:
    """Bytes at the peak of some work, and whether they are its own and not those of what stands in for it."""
    alive.begin()
    with alive:
        with suppress(RuntimeError):  # a number was looked at
            work()
            return alive.peak, True
        gc.collect()
        backbone, views = module.model.backbone, module.views
        rule, initial = backbone.coefficients, views.initial
        backbone.coefficients = LayerWise(trainable=rule.learns).bind(backbone.task_vectors)
        _hollow(backbone.coefficients)
        views.initial = backbone.coefficients.settled()
        instead()
        backbone.coefficients, views.initial = rule, initial
        return alive.peak, False


def _step(module: AdaptiveMerge, objective: Objective, batch: Batch, joint: bool) -> None:
    views = module.views
    step = Step(
        module.model,
        objective,
        batch,
        lambda task: views.expert(task, batch[task], None, objective.needs_blocks),
        lambda value: value,
        owns=False,
    )
    learning = [value for value in module.learned if value.requires_grad]
    for value in learning:  # of the step before: the trainer lets go of them between loss and backward
        value.grad = torch.empty_like(value)
    if joint:
        loss = step.joint()
    else:
        parts = {} if objective.needs_blocks else batch
        loss = step.per_task({task: views.features(task, part, None) for task, part in parts.items()})
    for value in learning:
        value.grad = None
    loss.backward()


@torch.no_grad()
def _score(module: AdaptiveMerge, task: str, count: int, image: tuple[int, ...]) -> None:
    module.eval()
    views = module.views
    views.release()
    batch = _batch(count, image)
    views.prepare("adapted")
    views.prepare("initial")  # beside this one, a merge that does not learn is kept
    prediction = module.model(task, batch["image"], views.weights("initial", task))
    views.expert(task, batch, None)
    del prediction
