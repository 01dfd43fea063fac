"""WEMoE: a router before each MLP mixes the experts' MLPs for the image (Tang et al., ICML 2024, arXiv 2402.00433).

y = W x + Σₜ gₜ(x) τₜ x for both layers of an MLP, g(x) = mean over tokens of [W₂ ReLU(W₁ x + b₁) + b₂], W the merge.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from adaptive_merge.adapters.base import Site
from adaptive_merge.adapters.mixing import mixed_product
from adaptive_merge.adapters.route import Layer, Route, as_tokens, layers_of
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["WEMoE"]


class WEMoE(Route):
    """A two-layer router per block adds each image's own mixture of task vectors to the layers of the MLP.

    The gates come on top of the merge: with the coefficients fixed at 0.3 it is the published model, whose router is
    one over θ₀ with a last bias of 0.3. Weights start at N(0, 0.01²), biases at 0. Nothing bounds a gate, as published.

    The task vectors are the merged bank's own rows, where the bank lies: no copy is made of them.

    The public code can average the gates over a batch (`batch_reduce`), and then does so when it scores: batches of one
    task then tell the task. Here they are per image always.

    Args:
        hidden: width of the router; None: that of the tower, as published.
    """

    replaces = True
    shared: ClassVar[bool] = False
    """Whether one router serves all blocks."""

    routers: nn.ModuleList

    def __init__(self, hidden: int | None = None) -> None:
        super().__init__()
        if hidden is not None and hidden < 1:
            raise InputError(f"a router has a width of at least 1, got hidden {hidden}")
        self.hidden = hidden

    def place(self, backbone: MergedBackbone) -> None:
        self.layers = layers_of(backbone, attention=False)
        self.gated = list(dict.fromkeys(layer.block for layer in self.layers))
        width = backbone.task_vectors.of(self.layers[0].weight).shape[-1]
        self.routers = nn.ModuleList(
            _router(width, self.hidden or width, len(self.tasks)) for _ in self.gated[: 1 if self.shared else None]
        )

    def sites(self, backbone: MergedBackbone, weights: Mapping[str, Tensor]) -> Mapping[str, Site]:
        self.seen = []
        return {layer.site: partial(self._mix, layer, backbone.task_vectors, weights) for layer in self.layers}

    def vectors(self, name: str, bank: TaskVectors) -> Tensor:
        """τ of a parameter, [T, *shape]."""
        return self.frozen[name] if name in self.frozen else bank.of(name)

    def tensors(self, bank: TaskVectors) -> dict[str, Tensor]:
        return {name: bank.of(name) for layer in self.layers for name in (layer.weight, layer.bias) if name}

    def _mix(
        self, layer: Layer, bank: TaskVectors, weights: Mapping[str, Tensor], task: None, tokens: Tensor, output: None
    ) -> Tensor:
        place = self.gated.index(layer.block)
        if len(self.seen) <= place:  # the first layer of its MLP
            self.seen.append(self.routers[0 if self.shared else place](as_tokens(tokens)).float().mean(1))
        weight, gates = weights[layer.weight], self.seen[place]
        mixed = mixed_product(_as_linear(tokens), gates, self.vectors(layer.weight, bank), weight)
        if layer.bias is not None:
            bias = weights[layer.bias] + gates @ self.vectors(layer.bias, bank).to(gates)
            mixed = mixed + (bias[:, None] if mixed.dim() == 3 else bias).to(mixed.dtype)
        return mixed


def _as_linear(tokens: Tensor) -> Tensor:
    """The tokens in the dtype in which a linear layer would take them here."""
    kind = tokens.device.type
    return tokens.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tokens


def _router(width: int, hidden: int, tasks: int) -> nn.Sequential:
    first, last = nn.Linear(width, hidden), nn.Linear(hidden, tasks)
    for layer in (first, last):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.ReLU(), last)
