"""One adaptation step, whole: unlabelled batches of all tasks in, one scalar out whose backward reaches what learns.

    θ = merge(state of the rule)
    for each task:  prediction = adapters, head and tower θ on its images
                    loss      += mean over its images, on all processes, of what the objective asks for

Two ways lead to the same gradients. `joint` builds one ordinary graph: all images in one forward. `per_task` bounds the
activations to those of one task: merged weights and all other trainables are used as detached leaves, each task's loss
is back-propagated at once into them, and the step returns total + (dot − dot.detach()) with dot = Σ ⟨live, leaf.grad⟩.
Its value is the loss; its single backward hands every collected gradient to the live parameters, so that automatic
optimisation, clipping and DDP work unchanged and every trainable gets its gradient exactly once.

Where the objective is a smooth maximum over tasks, α · log Σ exp(zₜ) with zₜ = ℓₜ / (T α), its gradient is that of
Σ wₜ ℓₜ with wₜ = softmax(z)ₜ / T, of the losses over all processes; `per_task` sums it online, see `Collected`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from adaptive_merge.engine.collected import Collected
from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.engine.perturb import perturbed
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
        self.alpha = objective.smooth_maximum
        self.logits: dict[str, Tensor] = {}
        """task → what the model says about its images before it learns from them."""
        self.entropies: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        """task → share of its images that the objective keeps, where it filters."""
        self.exponents: dict[str, Tensor] = {}
        """task → z of its loss, where the objective is a smooth maximum over tasks."""

    def joint(self) -> Tensor:
        """All tasks' images in one forward of the shared tower; the merge is one node of the graph."""
        if not self.batch:  # more processes than tasks
            return self._idle(joint=True)
        images = torch.cat([part["image"] for part in self.batch.values()])
        sizes = [len(part["image"]) for part in self.batch.values()]
        features = self.model.shared_features(images, self.model.backbone.merge(over=True))
        scores = self.model.scores(len(images))
        parts = zip(self.batch, features.split(sizes), [None] * len(sizes) if scores is None else scores.split(sizes))
        losses = torch.stack(
            [self._loss(task, self.model(task, None, features=part, scores=own)) for task, part, own in parts]
        )
        if self.alpha is None:
            return losses.sum()
        log_sum = self._log_sum()
        total = ((torch.stack(list(self.exponents.values())) - log_sum).exp() / len(self.model.tasks) * losses).sum()
        return total + (self.alpha * log_sum - total).detach()

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
        collected = Collected([*leaves.values(), *(weights.values() if rule.learns else ())])
        for task, part in self.batch.items():
            options: dict[str, Any] = {"weights": weights, "features": features.get(task)}
            options["blocks"] = self.objective.needs_blocks
            call = (task, part["image"])
            prediction = functional_call(model, leaves, call, options) if leaves else model(*call, **options)
            if self.objective.perturbs:
                prediction = replace(prediction, perturbed=self._perturbed(task, prediction, weights, leaves))
            loss = self._loss(task, prediction)
            collected.add(loss, self.exponents.get(task))
            total += loss.detach()
        if self.alpha is not None:
            log_sum = self._log_sum()
            collected.divide(log_sum, len(model.tasks))
            total = self.alpha * log_sum
        # What no task used keeps no gradient at all, so that Adam leaves it alone, momentum included.
        terms = [(live[name] * leaf.grad).sum() for name, leaf in leaves.items() if leaf.grad is not None]
        if rule.learns:
            terms.append(model.backbone.inject(state, [weight.grad for weight in weights.values()]))
        dot = torch.stack(terms).sum()
        return total + (dot - dot.detach())

    def _perturbed(
        self, task: str, prediction: Prediction, weights: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
    ) -> Tensor:
        def logits(images: Tensor) -> Tensor:
            said: Prediction = functional_call(self.model, dict(leaves), (task, images), {"weights": weights})
            return said.logits

        average = partial(self._average, task)
        images = self.batch[task]["image"]
        return perturbed(task, images, prediction, self.model.backbone, self.objective, logits, average)

    def _idle(self, joint: bool) -> Tensor:
        learning = [value for value in self.model.adapters.parameters() if value.requires_grad]
        zeros = [0.0 * value.sum() for value in learning]
        idle = torch.stack([*zeros, self.model.backbone.idle(joint)]).sum()
        return idle if self.alpha is None else idle + self.alpha * self._log_sum()

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
        if objective.filters:
            keep = objective.keep(prediction, expert)
            self.kept[task] = self._average(task, _mean(keep.float()))
            loss = weight * _mean(losses.where(keep, 0.0)) / self.kept[task].clamp_min(1e-12)
        else:
            loss = weight * _mean(losses)
        if self.alpha is not None:
            whole = loss.detach() / weight if self.owns else self.mean_over_ranks(loss)
            self.exponents[task] = whole / (len(self.model.tasks) * self.alpha)
        return loss

    def _log_sum(self) -> Tensor:
        """log Σ exp(zₜ) over the tasks of all processes; all of them ask."""
        exponents = self.exponents
        if not self.owns:
            return torch.stack(list(exponents.values())).logsumexp(0)
        zero = torch.zeros((), device=self.model.backbone.device)
        rows = [torch.stack([exponents.get(task, zero), zero + (task in exponents)]) for task in self.model.tasks]
        values, owned = self.mean_over_ranks(torch.stack(rows)).unbind(1)  # each comes from one process
        return (values / owned).logsumexp(0)

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
