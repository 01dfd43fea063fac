"""What does not learn: the models that a run is compared with, and what they say about the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptive_merge.engine.frozen import FrozenOutputs
from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.engine.views import View
from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.objectives.base import Prediction

__all__ = ["FrozenViews"]

Part = Mapping[str, Tensor]


class FrozenViews:
    """Weights of the views, and cached outputs of frozen networks.

    Args:
        model: the model that adapts.
        experts: the bank before any transform.
        outputs: keeps rows by image index.
    """

    def __init__(self, model: AdaptedModel, experts: TaskVectors, outputs: FrozenOutputs) -> None:
        self.model, self.experts, self.outputs = model, experts, outputs
        self.initial = model.backbone.coefficients.settled()
        shown = model.backbone.coefficients.display()
        self.start = None if shown is None else shown.detach().clone()
        self.anchor: Tensor | None = None
        self._held: dict[str, tuple[Any, Mapping[str, Tensor]]] = {}

    def weights(self, view: View, task: str) -> Mapping[str, Tensor]:
        """The tower's weights: θ₀, the task's expert, the merge before adaptation, or the merge as it is now.

        With the buffers that belong to them; those of the merge are the backbone's.
        """
        if view == "individual":
            return self._expert_weights(task)
        backbone = self.model.backbone
        if view == "adapted":
            return self._hold("merge", (view, backbone.coefficients.version), backbone.merge)
        if view == "initial":
            return self._hold("merge", view, lambda: backbone.merge_with(self.initial))
        bank = self.experts
        flat, buffers = (self.anchor, bank.buffers) if view == "anchor" else (bank.pretrained, bank.buffers_of())
        if flat is None:
            raise InputError("there is no view 'anchor' without a start")
        device = backbone.device
        return self._hold("merge", view, lambda: bank.layout.unflatten(flat.to(device)) | _on(buffers, device))

    def prepare(self, view: View) -> None:
        """Make the weights that all tasks share in a view, and hold them until `release`.

        To merge a bank that is sharded, all processes have to meet; after this, `weights` needs no other process.
        """
        if view != "individual":
            self.weights(view, self.model.tasks[0])

    def release(self) -> None:
        """Let go of the weights that were made last."""
        self._held.clear()

    @torch.no_grad()
    def features(self, task: str, part: Part, source: Any) -> Tensor | None:
        """The tower's features [B, d] where nothing in it can change and no adapter is in it; else None."""
        backbone = self.model.backbone
        if backbone.coefficients.learns or not self.model.plain_tower:
            return None
        identity = {"model": f"{backbone.task_vectors.fingerprint} {backbone.coefficients.fingerprint}"}
        return self._cached(task, "merged", identity, part, source, backbone)

    @torch.no_grad()
    def expert(self, task: str, part: Part, source: Any, blocks: bool = False) -> Prediction:
        """What the task's own expert says about a batch: no label, no gradient, once per image.

        Args:
            task: whose expert.
            part: {"image", "index"} of the batch; without "image" they are read from the source where one is unknown.
            source: the data set that the indices point into (`Images`), or None: then nothing is kept.
            blocks: also its mean tokens after each block.
        """

        def outputs(images: Tensor) -> Tensor:
            prediction = self.model(task, images, self._expert_weights(task), adapted=False, blocks=blocks)
            return torch.cat([prediction.features, *prediction.blocks], 1)

        identity = {"expert": self.experts.identity(task)}
        rows = self._cached(task, "expert-blocks" if blocks else "expert", identity, part, source, outputs)
        width = self.model.heads[task].width
        means = rows[:, width:].split(self.model.backbone.block_width(), 1) if blocks else ()
        prediction = self.model(task, None, features=rows[:, :width], adapted=False)
        return Prediction(prediction.features, prediction.logits, tuple(means))

    def _cached(
        self,
        task: str,
        kind: str,
        identity: dict[str, str],
        part: Part,
        source: Any,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        if source is None:
            return compute(part["image"])

        def missing(places: Tensor) -> Tensor:
            index = part["index"][places]
            images = part["image"][places] if "image" in part else source.take(index.cpu()).to(index.device)
            return compute(images)

        identity = identity | {"data": source.fingerprint}
        return self.outputs.rows(task, kind, identity, len(source), part["index"], missing)

    def _expert_weights(self, task: str) -> Mapping[str, Tensor]:
        # Without transforms the merged bank is the experts' bank, and may be on the device already.
        backbone = self.model.backbone
        same = backbone.task_vectors.fingerprints == self.experts.fingerprints
        bank, device = backbone.task_vectors if same else self.experts, backbone.device
        return self._hold("expert", task, lambda: _on(bank.expert(task), device))

    @torch.no_grad()
    def _hold(self, kind: str, key: Any, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """One merge and one expert at a time are held, until another of the kind is asked for."""
        if kind not in self._held or self._held[kind][0] != key:
            self._held.pop(kind, None)
            self._held[kind] = (key, make())
        return self._held[kind][1]


def _on(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
