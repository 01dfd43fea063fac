"""`AdaptiveMerge`: parts in, `trainer.fit` out. The only file that knows all the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from adaptive_merge.coefficients import Coefficients, Fixed
from adaptive_merge.errors import InputError
from adaptive_merge.merge import MergedBackbone
from adaptive_merge.model import AdaptedModel
from adaptive_merge.objectives import Entropy, Objective, normalised_entropy
from adaptive_merge.task_vectors import TaskVectors
from adaptive_merge.transforms import Transform

__all__ = ["VIEWS", "AdaptiveMerge", "View"]

View = Literal["pretrained", "individual", "initial", "adapted"]
VIEWS: tuple[View, ...] = ("pretrained", "individual", "initial", "adapted")


class AdaptiveMerge(pl.LightningModule):
    """A merge of experts that learns on unlabelled test batches. Every method is a choice of its parts.

    Args:
        task_vectors: the bank of pre-trained weights and experts.
        backbone: any module that maps a batch to features [B, d]; its weights are not used.
        heads: task → frozen classifier weight [C, d].
        recipe: name of this choice of parts, for results and reports.
        transforms: applied to the task vectors in order, before merging.
        coefficients: how many coefficients, where they start, how they are bounded. Default `Fixed(0.3)`.
        objective: what an unlabelled batch asks for. Default `Entropy()`.
        lr: Adam's learning rate.
        betas: Adam's betas.
        weight_decay: above 0, decoupled as in AdamW.
        accumulate: `"joint"` runs all tasks' images of a step as one batch, best on GPUs. `"per_task"` runs
            and back-propagates one task after the other, so that one task's activations are alive at a time;
            the gradients are the same. `"auto"`: joint on CUDA, per task elsewhere.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        backbone: nn.Module,
        heads: Mapping[str, Tensor],
        recipe: str = "custom",
        transforms: Sequence[Transform] = (),
        coefficients: Coefficients | None = None,
        objective: Objective | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        accumulate: Literal["auto", "joint", "per_task"] = "auto",
    ) -> None:
        super().__init__()
        if accumulate not in ("auto", "joint", "per_task"):
            raise InputError(f"unknown accumulate {accumulate!r}; choose 'auto', 'joint' or 'per_task'")
        self.recipe, self.lr, self.betas, self.weight_decay = recipe, lr, betas, weight_decay
        self.accumulate = accumulate
        self.experts = task_vectors
        bank = task_vectors
        for transform in transforms:
            bank = transform(bank)
        self.model = AdaptedModel(MergedBackbone(backbone, bank, coefficients or Fixed(0.3)), heads)
        self.objective = objective or Entropy()
        self.initial = self.model.backbone.coefficients().detach().clone()
        self.accuracy = nn.ModuleList(
            MulticlassAccuracy(max(len(heads[task]), 2), average="micro") for task in self.tasks
        )
        self.view: View = "adapted"
        self._static: tuple[Any, dict[str, Tensor]] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of the bank."""
        return self.model.tasks

    @property
    def coefficients(self) -> Coefficients:
        """The merging coefficients Λ."""
        return self.model.backbone.coefficients

    def forward(self, task: str, images: Tensor) -> Tensor:
        """Logits [B, C] of the adapted model for images of one task."""
        return self.model(task, images).logits

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """One update on unlabelled batches, task → {"image", "index"}; the loss is summed over the tasks."""
        run = self._run_joint if self._joint() else self._run_per_task
        loss, predictions = run(batch)
        entropies = torch.stack([normalised_entropy(logits) for logits in predictions.values()])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=1)
        self.log("train/entropy", entropies.mean(), prog_bar=True, batch_size=1)
        self.log_dict({f"train/{task}/entropy": value for task, value in zip(predictions, entropies)}, batch_size=1)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the correct predictions of one labelled batch of one task, for the view in force."""
        task = batch["task"]
        logits = self.model(task, batch["image"], self._weights(task)).logits
        self.accuracy[self.tasks.index(task)].update(logits, batch["label"])

    def on_validation_epoch_end(self) -> None:
        """Log `<view>/<task>/accuracy` and the mean over tasks, and start the next count."""
        self.log_dict(self._accuracies())
        self._static = None

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Adam over what learns; none for a run of no steps, which only scores."""
        if self.trainer.max_steps == 0:
            return None
        learning = self.check_learns()
        kind = torch.optim.AdamW if self.weight_decay else torch.optim.Adam
        return kind(learning, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then bring projected coefficients back into their bounds."""
        super().optimizer_step(*args, **kwargs)
        self.coefficients.project_()

    def check_learns(self) -> list[nn.Parameter]:
        """What learns; InputError where nothing does."""
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not learning:
            raise InputError(
                f"recipe {self.recipe!r} has nothing to learn: its coefficients are fixed; "
                "set trainer.max_steps to 0 to score it, or use `merge`"
            )
        return learning

    def merged_state_dict(self) -> dict[str, Tensor]:
        """The merged weights as plain tensors; they load into the plain backbone."""
        return self.model.backbone.merged_state_dict()

    @contextmanager
    def viewing(self, view: View) -> Iterator[AdaptiveMerge]:
        """Validate another model: the pre-trained one, each expert on its own task, or the merge before adaptation."""
        before, self.view, self._static = self.view, view, None
        try:
            yield self
        finally:
            self.view, self._static = before, None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say what the few kilobytes belong to."""
        checkpoint["adaptive_merge"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse coefficients that were learned for other experts or groups."""
        found = checkpoint.get("adaptive_merge", {})
        for key, wanted in self._identity().items():
            if found.get(key) != wanted:
                raise InputError(
                    f"the checkpoint was written with another {key}: {found.get(key)!r}, this run has {wanted!r}; "
                    "resume with the configuration that it was written with"
                )

    def _identity(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "tasks": list(self.tasks),
            "granularity": self.coefficients.granularity,
            "task vectors": self.model.backbone.task_vectors.fingerprint,
        }

    def _joint(self) -> bool:
        return self.accumulate == "joint" or (self.accumulate == "auto" and self.device.type == "cuda")

    def _run_joint(self, batch: dict[str, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """All tasks' images in one forward; the merge is one node of an ordinary graph."""
        images = torch.cat([part["image"] for part in batch.values()])
        features = self.model.backbone(images).split([len(part["image"]) for part in batch.values()])
        predictions = {task: self.model.classify(task, part) for task, part in zip(batch, features)}
        losses = [self.objective(prediction, None) for prediction in predictions.values()]
        return torch.stack(losses).sum(), {task: prediction.logits for task, prediction in predictions.items()}

    def _run_per_task(self, batch: dict[str, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """One task after the other: collect gradients in detached weights, then inject them into Λ.

        The step returns total + (dot − dot.detach()) with dot = ⟨Λ, ∂L/∂Λ⟩: its value is the loss, and its
        single backward hands the collected gradient to the coefficients, so that automatic optimisation,
        clipping and DDP work unchanged.
        """
        backbone = self.model.backbone
        coefficients = backbone.coefficients()
        weights = {name: value.requires_grad_() for name, value in backbone.merge_with(coefficients).items()}
        total, logits = coefficients.new_zeros(()), {}
        for task, part in batch.items():
            prediction = self.model(task, part["image"], weights)
            loss = self.objective(prediction, None)
            loss.backward()
            total += loss.detach()
            logits[task] = prediction.logits.detach()
        dot = (coefficients * backbone.project([weight.grad for weight in weights.values()])).sum()
        return total + (dot - dot.detach()), logits

    def _weights(self, task: str) -> dict[str, Tensor]:
        """The weights of the view in force, made once and kept until the view, the task or Λ changes."""
        key = (self.view, task if self.view == "individual" else None, self.coefficients.values._version)
        if self._static is None or self._static[0] != key:
            self._static = None
            self._static = (key, self._make_weights(task))
        return self._static[1]

    @torch.no_grad()
    def _make_weights(self, task: str) -> dict[str, Tensor]:
        backbone = self.model.backbone
        makers: dict[View, Callable[[], dict[str, Tensor]]] = {
            "pretrained": lambda: backbone.merge_with(torch.zeros_like(self.initial)),
            "individual": lambda: {
                name: value.to(self.device)
                for name, value in self.experts.expert(task).items()
                if name in self.experts.names
            },
            "initial": lambda: backbone.merge_with(self.initial),
            "adapted": backbone.merge,
        }
        return makers[self.view]()

    def _accuracies(self) -> dict[str, Tensor]:
        values = {
            f"{self.view}/{task}/accuracy": metric.compute()
            for task, metric in zip(self.tasks, self.accuracy)
            if metric.update_count
        }
        for metric in self.accuracy:
            metric.reset()
        if values:
            values[f"{self.view}/accuracy"] = torch.stack(list(values.values())).mean()
        return values
