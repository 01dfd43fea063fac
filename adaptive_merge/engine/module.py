"""`AdaptiveMerge`: parts in, `trainer.fit` out. The only file that knows all the parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from adaptive_merge.adapters.base import Adapter
from adaptive_merge.adapters.heads import HeadLike
from adaptive_merge.coefficients.linear import Fixed
from adaptive_merge.engine import identity
from adaptive_merge.engine.batches import check_batch
from adaptive_merge.engine.begin import Begun, begin, rebased
from adaptive_merge.engine.choices import check_settings, experts_of, merged_of
from adaptive_merge.engine.frozen import FrozenOutputs
from adaptive_merge.engine.memory import joint_is_small
from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.engine.perturb import check_share
from adaptive_merge.engine.replay import replay
from adaptive_merge.engine.scored import ScoredModule
from adaptive_merge.engine.scoring import TaskScore
from adaptive_merge.engine.step import Batch, Step
from adaptive_merge.engine.strategy import announce, bound_waiting, closing, suit_ddp
from adaptive_merge.engine.teachers import FrozenViews
from adaptive_merge.engine.typed import ListOf
from adaptive_merge.engine.unknown import TaskName, check_task_name
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.merge.placement import BankKind
from adaptive_merge.merge.rule import Rule
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.objectives.base import Objective, Prediction
from adaptive_merge.objectives.certainty import Entropy
from adaptive_merge.schedule import Stage, adam, at_step, check_rates
from adaptive_merge.starts.base import Start
from adaptive_merge.transforms.base import Transform

__all__ = ["AdaptiveMerge"]


class AdaptiveMerge(ScoredModule):
    """A merge of experts that learns on unlabelled test batches. Every method is a choice of its parts.

    Args:
        task_vectors: the bank of pre-trained weights and experts.
        backbone: any module that maps a batch to features [B, d]; its weights are not used.
        heads: task → frozen head: the weight [C, d] of a zero-shot classifier, a linear layer, or a `Head`.
        recipe: name of this choice of parts, for results and reports.
        transforms: applied to the task vectors in order, before merging.
        start: solved in closed form from the stream before the first step; transforms and coefficients say from which
            static merge, its anchor. What learns goes on from the solution: θ = θ* + Σ λₜ(θₜ − θ*), λ from 0.
        coefficients: how many coefficients, where they start, how they are bounded. Default `Fixed(0.3)`.
        adapters: what each task has of its own.
        objective: what an unlabelled batch asks for. Default `Entropy()`.
        stages: stage after stage instead of one objective for the whole run.
        lr: Adam's learning rate.
        adapter_lr: of the adapters; default `lr`.
        betas: Adam's betas.
        weight_decay: above 0, decoupled as in AdamW.
        accumulate: `"joint"` runs all tasks' images of a step as one batch, best on GPUs and for small batches.
            `"per_task"` runs and back-propagates one task after the other, so that one task's activations are alive
            at a time; the gradients are the same. `"auto"`: joint where the activations are a small part of the
            device's memory.
        cache: folder that keeps what frozen networks say about the images between runs; default: in memory.
        unseen: tasks whose experts are left out of the merge; they are scored with their own heads, without
            adapters. From the command line the protocol `Unseen` says which.
        bank: `"resident"`: the bank is held on each device. `"streamed"`: it stays in host memory and crosses to
            the device piece by piece, twice a step. `"sharded"`: each process holds one slice of it on its device;
            weights and their gradients are exchanged every step. All learn the same.
        blocks: pattern of the names of the backbone's repeated blocks (`layer*.*`), for all that works on blocks;
            default: told by the parameters' names, see `merge.blocks`.
        task: `"unknown"`: scored without the name of an image's task; the adapters' route picks the head.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        backbone: nn.Module,
        heads: Mapping[str, HeadLike],
        recipe: str = "custom",
        transforms: Sequence[Transform] = (),
        coefficients: Rule | None = None,
        adapters: Sequence[Adapter] = (),
        objective: Objective | None = None,
        stages: Sequence[Stage] = (),
        start: Start | None = None,
        lr: float = 1e-3,
        adapter_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        accumulate: Literal["auto", "joint", "per_task"] = "auto",
        cache: str | None = None,
        unseen: Sequence[str] = (),
        bank: BankKind = "resident",
        blocks: str | None = None,
        task: TaskName = "known",
    ) -> None:
        super().__init__()
        check_settings(accumulate, stages, objective)
        self.recipe, self.accumulate, self.blocks = recipe, accumulate, blocks
        self.lr, self.adapter_lr = lr, lr if adapter_lr is None else adapter_lr
        check_rates(self.lr, self.adapter_lr, betas, weight_decay)
        self.betas, self.weight_decay = betas, weight_decay
        self.experts, self.unseen = experts_of(task_vectors, blocks), tuple(unseen)
        before, merged = merged_of(self.experts, self.unseen, transforms)
        tower = MergedBackbone(backbone, merged, coefficients or Fixed(0.3), bank, before)
        self.model = AdaptedModel(tower, heads, adapters, self.unseen)
        # A rule says by `requires_grad` what of it learns; stages switch that on and off.
        self.rule_parameters = [value for value in self.coefficients.parameters() if value.requires_grad]
        self.stages = list(stages) or [Stage(1, "all", objective or Entropy())]
        self.task = check_task_name(task, self.model, recipe)
        routed = (len(merged.tasks) * (self.model.route is not None), task == "unknown")
        self.scores: ListOf[TaskScore] = ListOf(TaskScore(self.model.heads[t], *routed) for t in self.experts.tasks)
        self.step_logits: dict[str, Tensor] = {}  # of the last step, by task
        self._nothing_kept = True  # since the last optimiser step
        self._small: bool | None = None  # whether one graph of all tasks is small; known after the first step
        self.views = FrozenViews(self.model, self.experts, FrozenOutputs(cache))
        self._parts, self._transforms = identity.of_parts(self, transforms), tuple(transforms)
        self.start = start
        self.begun: Begun | None = None
        self.start_folder: Path | None = None  # where a run keeps its start
        if start is not None:
            self._parts |= identity.of_part("start", start)
            copy.deepcopy(self.coefficients).rebase(merged)  # refused now, not after the start is solved
        identity.check_numbers(self._parts)
        self._data: identity.Identity | None = None
        self._vectors: str | None = None

    @property
    def merged_fingerprints(self) -> dict[str, str]:
        """sha256 of the pre-trained weights and of the experts in the merge."""
        return {name: self.experts.fingerprints[name] for name in ("pretrained", *self.tasks)}

    @property
    def merged_experts(self) -> TaskVectors:
        """The experts in the merge, before any transform."""
        return self.model.backbone.experts

    def go_on_from(self, begun: Begun) -> None:
        """Merge around a start's solution from now on: coefficients at 0, adapters made anew."""
        self._vectors = self.model.backbone.task_vectors.fingerprint
        self.model.rebase(rebased(self.merged_experts, begun))
        self.begun = begun
        self.rule_parameters = [value for value in self.coefficients.parameters() if value.requires_grad]
        self.views = FrozenViews(self.model, self.experts, self.views.outputs)
        self.views.anchor = begun.anchor

    @property
    def vectors_fingerprint(self) -> str:
        """sha256 of the transformed task vectors, also where a start has replaced them."""
        return self._vectors or self.model.backbone.task_vectors.fingerprint

    @property
    def coefficients(self) -> Rule:
        """The rule of the merge: the coefficients Λ, or whatever else is learned about it."""
        return self.model.backbone.coefficients

    @property
    def stage(self) -> Stage:
        """The stage that the run has reached: a function of the steps taken, so that a resumed run agrees."""
        return at_step(self.stages, self.global_step)

    @property
    def learned(self) -> list[nn.Parameter]:
        """Everything that learns, in any stage."""
        return [*self.rule_parameters, *self.model.adapters.parameters()]

    def forward(self, task: str, images: Tensor) -> Tensor:
        """Logits [B, C] of the adapted model for images of one task."""
        return self.model(task, images).logits

    def on_train_start(self) -> None:
        """Say what learns. A resumed run hears again what frozen networks said before, batch for batch."""
        announce(self.trainer, self.experts, self.learned, self._stream)
        if self._stream and self.global_step:
            replay(self, self._stream, self.enter)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One update on unlabelled batches, task → {"image", "index"}, and "weight" where processes hold unequal parts.

        What the model said about the images, before it learns from them, is in `said`: task → logits [B, C].
        """
        check_batch(batch, self.tasks, self._owns_tasks())
        objective = self.enter(self.stage)

        def expert(task: str) -> Prediction:
            return self.views.expert(task, batch[task], self._source(task), objective.needs_blocks)

        step = Step(self.model, objective, batch, expert, self._mean_over_ranks, self._owns_tasks())
        if self.joins(objective, batch, self._processes):
            loss = step.joint()
        else:
            parts = {} if objective.needs_blocks else batch
            loss = step.per_task(
                {task: self.views.features(task, part, self._source(task)) for task, part in parts.items()}
            )
        self.step_logits = step.logits
        self._log_step(step.gather(loss, self.tasks, self._processes), step.entropies, step.kept)
        # Lightning cannot skip a step by returning None on several processes.
        self._nothing_kept &= bool(step.kept) and not any(step.kept.values())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Where no image was kept on any process: without gradients Adam leaves everything alone, moments included."""
        if self._nothing_kept:
            optimizer.zero_grad()
        self.coefficients.withhold_()

    def configure_callbacks(self) -> list[pl.Callback]:
        """One for what modules have no hook for; this is also the last hook before the processes form their group."""
        bound_waiting(self.trainer.strategy)
        return closing(self.trainer)

    def setup(self, stage: str) -> None:
        """Check that module and stream agree on the tasks, share the bank out, and make plain DDP fit."""
        self._check_stream()
        if stage == "fit":
            self._data = identity.of_data(getattr(self.trainer, "datamodule", None))
        if self.start is not None and self.begun is None:
            merged = self.merged_experts
            self.go_on_from(begin(self.start, self.model, merged, self.trainer, self._parts, self.start_folder))
        self.model.backbone.placement.open(self.trainer.global_rank, self.trainer.world_size)
        check_share(self.stages, self._owns_tasks())
        suit_ddp(self.trainer, partly_used=bool(self.model.adapters))

    def teardown(self, stage: str) -> None:
        """From here on one process may merge without the others; what scoring has said is kept as well."""
        self.views.outputs.flush()
        self.model.backbone.placement.close()

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Adam over what learns; none for a run of no steps, which only scores."""
        if self.trainer.max_steps == 0:
            return None
        self.check_learns()
        shared, *own = self.coefficients.rated(self.rule_parameters, self.lr)
        adapters = [*self.model.adapters.parameters()], self.adapter_lr
        return adam((shared, adapters, *own), self.betas, self.weight_decay)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then bring projected coefficients back into their bounds."""
        super().optimizer_step(*args, **kwargs)
        self.coefficients.bound_()
        self._nothing_kept = True

    def on_fit_end(self) -> None:
        """Keep what the cache has learned about the images; let go of the expert that was asked last."""
        self.views.outputs.flush()
        self.views.release()

    def check_learns(self) -> None:
        """InputError where nothing learns."""
        if not self.learned:
            raise InputError(
                f"recipe {self.recipe!r} has nothing to learn: its coefficients are fixed and it has no adapters; "
                "set trainer.max_steps to 0 to score it, or use `merge`"
            )

    def merged_state_dict(self, task: str | None = None) -> dict[str, Tensor]:
        """The merged weights as plain tensors that load into the plain backbone; with a task, its tints included."""
        return self.model.merged_state_dict(task)

    @property
    def method(self) -> dict[str, Any]:
        """The method as plain values under names that users know: what a checkpoint of it belongs to."""
        return identity.of_method(self, self._parts)

    @property
    def recorded_method(self) -> dict[str, Any]:
        """The method as files keep it."""
        return identity.recorded(self.method, self._transforms)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say which method and data the few kilobytes belong to; the recipe's label is for people."""
        data = self._data or identity.of_data(None)
        checkpoint["adaptive_merge"] = {"recipe": self.recipe, "method": self.recorded_method, "data": data}
        states = [stage.objective.state_dict() for stage in self.stages]
        checkpoint |= {"objectives": states} if any(states) else {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what was learned by another method or, to go on learning, on other data."""
        going_on = self._trainer is not None and self._trainer.training
        identity.check(checkpoint, self.method, self._data if going_on else None)
        for stage, state in zip(self.stages, checkpoint.get("objectives", ())):
            stage.objective.load_state_dict(state)

    def enter(self, stage: Stage) -> Objective:
        """Let learn what learns in a stage; its objective."""
        if len(self.stages) > 1:
            for parameter in self.rule_parameters:
                parameter.requires_grad_(stage.learn != "adapters")
            self.model.adapters.requires_grad_(stage.learn != "coefficients")
        return stage.objective

    def joins(self, objective: Objective, batch: Batch, processes: int) -> bool:
        """Whether a step is one graph, in a run of so many processes; the same answer on all of them."""
        changes = self.coefficients.learns or not self.model.plain_tower  # else features are cached
        bare = not objective.needs_blocks and not objective.perturbs
        fits = self.model.shares_tower and changes and bare
        if self.accumulate != "auto" or not fits:
            return fits and self.accumulate == "joint"
        if self._small is None:
            images = [part["image"] for part in batch.values()]
            small = joint_is_small(self.model.backbone, images, processes) if images else False
            self._small = self.trainer.strategy.broadcast(small) if self._processes > 1 else small
        return self._small

    def _log_step(self, loss: Tensor, entropies: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log("train/entropy", torch.stack(list(entropies.values())).mean(), prog_bar=True, batch_size=1)
        self.log_dict({f"train/{task}/entropy": value for task, value in entropies.items()}, batch_size=1)
        if kept:
            self.log("train/kept", torch.stack(list(kept.values())).mean(), batch_size=1)
