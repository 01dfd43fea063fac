"""One adaptation step, whole: unlabelled batches of all tasks in, one scalar out whose backward reaches what learns.

    θ = merge(state of the rule)
    for each task:  prediction = adapters, head and tower θ on its images
                    loss      += mean over its images, on all processes, of what the objective asks for

Two ways lead to the same gradients. `joint` builds one ordinary graph: all images in one forward. `per_task` bounds the
activations to those of one task: merged weights and all other trainables are used as detached leaves, each task's loss
is back-propagated at once into them, and the step returns total + (dot − dot.detach()) with dot = Σ ⟨live, leaf.grad⟩.
Its value is the loss; its single backward hands every collected gradient to the live parameters, so that automatic
optimisation, clipping and DDP work unchanged and every trainable gets its gradient exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.objectives.base import Objective, Prediction
from adaptive_merge.objectives.functional import normalised_entropy

__all__ = ["Batch", "Step"]

Batch = dict[str, dict[str, Tensor]]


class Step:
    """The losses of one step over all processes, each of which holds a part of every task's images, or whole tasks.

    DDP averages the gradients over the W processes. A task's loss on a process is therefore W times this process's
    part of the mean over all images, or over all images that the objective keeps.

    Args:
        model: merged backbone, adapters and heads.
        objective: what the images ask for.
        batch: task → {"image", "index"}, and "weight" where the processes hold unequal parts.
        expert: the prediction of a task's expert for its batch; asked where the objective needs it.
        mean_over_ranks: the mean of numbers over the processes.
        owns: whether a process holds whole tasks.
    """

    def __init__(
        self,
        model: AdaptedModel,
        objective: Objective,
        batch: Batch,
        expert: Callable[[str], Prediction],
        mean_over_ranks: Callable[[Tensor], Tensor],
        owns: bool,
    ) -> None:
        self.model, self.objective, self.batch = model, objective, batch
        self.expert, self.mean_over_ranks, self.owns = expert, mean_over_ranks, owns
        self.logits: dict[str, Tensor] = {}
        """task → what the model says about its images before it learns from them."""
        self.entropies: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        """task → share of its images that the objective keeps, where it filters."""

    def joint(self) -> Tensor:
        """All tasks' images in one forward of the shared tower; the merge is one node of the graph."""
        if not self.batch:  # more processes than tasks
            return self._idle(joint=True)
        images = torch.cat([part["image"] for part in self.batch.values()])
        sizes, features = [len(part["image"]) for part in self.batch.values()], self.model.shared_features(images)
        scores = self.model.scores(len(images))
        parts = zip(self.batch, features.split(sizes), [None] * len(sizes) if scores is None else scores.split(sizes))
        losses = [self._loss(task, self.model(task, None, features=part, scores=own)) for task, part, own in parts]
        return torch.stack(losses).sum()

    def per_task(self, features: Mapping[str, Tensor | None]) -> Tensor:
        """One task after the other: collect gradients in leaves, then inject them.

        Args:
            features: task → features [B, d] of its batch, where a frozen tower has computed them before.
        """
        if not self.batch:
            return self._idle(joint=False)
        model, rule = self.model, self.model.backbone.coefficients
        state = rule.state() if rule.learns else ()
        weights = model.backbone.merge_leaves(state) if rule.learns else model.backbone.merge()
        live = {f"adapters.{name}": value for name, value in model.adapters.named_parameters() if value.requires_grad}
        leaves = {name: parameter.detach().requires_grad_() for name, parameter in live.items()}
        total = torch.zeros((), device=model.backbone.device)
        for task, part in self.batch.items():
            options: dict[str, Any] = {"weights": weights, "features": features.get(task)}
            options["blocks"] = self.objective.needs_blocks
            call = (task, part["image"])
            prediction = functional_call(model, leaves, call, options) if leaves else model(*call, **options)
            loss = self._loss(task, prediction)
            loss.backward()
            total += loss.detach()
        # What no task used keeps no gradient at all, so that Adam leaves it alone, momentum included.
        terms = [(live[name] * leaf.grad).sum() for name, leaf in leaves.items() if leaf.grad is not None]
        if rule.learns:
            terms.append(model.backbone.inject(state, [weight.grad for weight in weights.values()]))
        dot = torch.stack(terms).sum()
        return total + (dot - dot.detach())

    def _idle(self, joint: bool) -> Tensor:
        learning = [value for value in self.model.adapters.parameters() if value.requires_grad]
        zeros = [0.0 * value.sum() for value in learning]
        return torch.stack([*zeros, self.model.backbone.idle(joint)]).sum()

    def _loss(self, task: str, prediction: Prediction) -> Tensor:
        """The loss of a task, a scalar: the objective's mean over the units (images) of the task on all processes."""
        objective, weight = self.objective, self.batch[task].get("weight", 1.0)
        self.logits[task], self.entropies[task] = prediction.logits.detach(), normalised_entropy(prediction.logits)
        expert = self.expert(task) if objective.needs_expert else None
        statistics = objective.statistics(prediction, expert)
        if statistics is not None:  # a process's part of a small batch may be empty
            mean = statistics.sum(0) / max(len(statistics), 1)
            prediction = replace(prediction, statistics=self._average(task, mean))
        losses = objective.losses(prediction, expert)
        if not objective.filters:
            return weight * _mean(losses)
        keep = objective.keep(prediction, expert)
        self.kept[task] = self._average(task, _mean(keep.float()))
        return weight * _mean(losses.where(keep, 0.0)) / self.kept[task].clamp_min(1e-12)

    def _average(self, task: str, mean: Tensor) -> Tensor:
        """A mean over this process's images of a task as one over all of them; a task's owner has them all."""
        return mean if self.owns else self.mean_over_ranks(self.batch[task].get("weight", 1.0) * mean)

    def gather(self, loss: Tensor, tasks: Sequence[str], processes: int) -> Tensor:
        """The loss for the log: this process's part of it. Where processes own tasks it is that of the whole step, and
        the entropies and kept shares of all tasks come in.
        """
        if not self.owns:
            return loss.detach()
        zero, middle = torch.zeros_like(loss), len(tasks)
        parts = [part.get(task, zero) for part in (self.entropies, self.kept) for task in tasks]
        total, *values = self.mean_over_ranks(torch.stack([loss.detach(), *parts]))
        values = [processes * value for value in values]  # each comes from one process, and is 0 on the others
        self.entropies = dict(zip(tasks, values[:middle]))
        self.kept = dict(zip(tasks, values[middle:])) if self.objective.filters else {}
        return total


def _mean(values: Tensor) -> Tensor:
    """The mean; 0 of nothing, with a gradient of 0."""
    return values.mean() if len(values) else values.sum()
