"""Fisher merging from the unlabelled stream: entries that an expert's predictions hang on weigh more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptive_merge.adapters.heads import Head
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import without_weights
from adaptive_merge.starts.base import Problem, Solution, Start
from adaptive_merge.starts.predictions import heads_of, label_weights, logits_of

__all__ = ["Fisher"]


class Fisher(Start):
    """Fisher merging (Matena & Raffel, arXiv 2111.09832): θ = Σ_t F_t θ_t / Σ_t F_t, entry by entry.

    F_t = mean over images of Σ_y p(y|x) (∇ log p(y|x))² is the exact diagonal, an image and a label at a time, over
    the expert's own predictions; no label is needed, a head of every task is.

    Args:
        samples: labels drawn a unit from the expert's prediction; None: the expectation over all classes, which
            takes a backward pass for each.
        normalise: whether each task's F is divided by its norm over the model.
        floor: added to every F, so that entries on which no prediction hangs are averaged.
    """

    def __init__(self, samples: int | None = None, normalise: bool = False, floor: float = 1e-6) -> None:
        if samples is not None and samples < 1:
            raise InputError(f"`samples` is a number of labels an image, at least 1, or null for all; got {samples}")
        if not floor > 0:
            raise InputError(f"`floor` keeps entries without information from dividing by zero; got {floor}")
        self.samples, self.normalise, self.floor = samples, normalise, floor

    def solve(self, problem: Problem) -> Solution:
        tower, heads, tasks = without_weights(problem.backbone), heads_of(problem), problem.experts.tasks
        identity = problem.identity(self) if problem.store else ""
        done, weighted, total = self._resume(problem, identity)
        for number, task in enumerate(tasks[done:], start=done + 1):
            information = self._information(tower, heads[task], problem, task)
            weighted += information * torch.cat([part.flatten() for part in problem.expert(task).values()])
            total += information
            if problem.store:
                problem.store.save(identity, number, {"weighted": weighted, "total": total})
            if problem.progress:
                problem.progress(number, len(tasks))
        return Solution(weighted / total)

    def _information(self, tower: nn.Module, head: Head, problem: Problem, task: str) -> Tensor:
        """F_t [P] over the images of all processes."""
        weights = {name: value.requires_grad_() for name, value in problem.expert(task).items()}
        buffers, images = problem.buffers_of(task), 0
        squares = torch.zeros(problem.experts.layout.numel + 1, device=problem.anchor.device)
        for batch in problem.batches(task):
            for image in batch:
                logits = logits_of(tower, weights | buffers, image[None], head)
                share = label_weights(logits, self.samples, f"{task} {images}")
                squares[:-1] += _expected_square(logits, share, list(weights.values()))
                images += 1
        squares[-1] = images
        squares = problem.reduce(squares)
        if not squares[-1] > 0:
            raise InputError(f"`images` has no image of task {task!r}; give at least one, or leave the task out")
        information = squares[:-1] / squares[-1]
        if self.normalise:
            information = information / information.norm().clamp_min(1e-30)
        return information + self.floor

    def _resume(self, problem: Problem, identity: str) -> tuple[int, Tensor, Tensor]:
        kept = problem.store.load(identity) if problem.store else None
        if kept:
            weighted, total = (kept[1][name].to(problem.anchor.device) for name in ("weighted", "total"))
            return kept[0], weighted, total
        blank = torch.zeros(problem.experts.layout.numel, device=problem.anchor.device)
        return 0, blank, blank.clone()


def _expected_square(logits: Tensor, share: Tensor, parameters: list[Tensor]) -> Tensor:
    """Σ_y share(y) (∇ log p(y))² [P], over the units of one image's logits [1, k, C]."""
    log, total = logits.log_softmax(-1)[0], torch.zeros(sum(p.numel() for p in parameters), device=logits.device)
    for unit, label in share[0].nonzero():
        gradients = torch.autograd.grad(log[unit, label], parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters)]
        total = total + share[0, unit, label] * torch.cat([part.flatten() for part in parts]) ** 2
    return total
