"""What an expert has beyond the merge, in a few directions of each matrix of a block: Dₜ = θₜ − θ ≈ Uₜ Sₜ Vₜᵀ.

For an image, or a token, with gates g the layer gives y + Σₜ gₜ Uₜ Sₜ Vₜᵀ x: two products with all tasks' directions
side by side, so that nothing is made per image. Biases of layers are mixed whole. What is no matrix of a block, such as
norms, embeddings and the projection, stays as merged.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptive_merge.adapters.base import Site
from adaptive_merge.adapters.route import Layer, Route, as_tokens, layers_of
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone

__all__ = ["LowRankRoute", "pretrained"]


class LowRankRoute(Route):
    """A route over low-rank experts on a fixed merge, made once by singular value decomposition; see the module."""

    def place(self, backbone: MergedBackbone) -> None:
        if backbone.coefficients.learns:
            raise InputError(
                f"{type(self).__name__} holds what the experts have beyond a merge that stays as it is; choose fixed "
                "coefficients, such as Fixed(0.3)"
            )
        self.layers = layers_of(backbone, attention=True)

    def freeze(self, backbone: MergedBackbone) -> dict[str, Tensor]:
        merged = backbone.merge()
        frozen: dict[str, Tensor] = {}
        for layer in self.layers:
            frozen |= self._factors(layer.weight, self.own(backbone, merged, layer.weight))
            if layer.bias is not None:
                frozen[layer.bias] = self.own(backbone, merged, layer.bias).float()
        return frozen

    @abstractmethod
    def kept(self, full: int) -> int:
        """How many of the `full` singular values of a matrix are kept."""

    @abstractmethod
    def gates(self, layer: Layer, tokens: Tensor) -> Tensor:
        """g for tokens [B, N, in] of a layer: [B, N, T], or [B, 1, T] where an image's tokens have the same."""

    def own(self, backbone: MergedBackbone, merged: Mapping[str, Tensor], name: str) -> Tensor:
        """θₜ − θ of a parameter in float64, [T, *shape], of the experts as they were before transforms."""
        vectors, start = backbone.experts.of(name).double(), pretrained(backbone, name)
        return vectors + (start.double() - merged[name].to(start.device).double())

    def _factors(self, name: str, differences: Tensor) -> dict[str, Tensor]:
        """`name.right`: Vₜᵀ [T, k, in]; `name.left`: Uₜ Sₜ [T, out, k]."""
        kept = min(max(self.kept(min(differences.shape[1:])), 1), *differences.shape[1:])
        parts = [torch.linalg.svd(matrix, full_matrices=False) for matrix in differences]
        right, left = [vt[:kept] for _, _, vt in parts], [u[:, :kept] * s[:kept] for u, s, _ in parts]
        return {f"{name}.right": torch.stack(right).float(), f"{name}.left": torch.stack(left).float()}

    def sites(self, backbone: MergedBackbone, weights: Mapping[str, Tensor]) -> Mapping[str, Site]:
        self.seen = []
        sites: dict[str, Site] = {}
        pairs: dict[str, list[Layer]] = {}
        for layer in self.layers:
            if layer.attention:
                pairs.setdefault(layer.site, []).append(layer)
            else:
                sites[layer.site] = partial(self._linear, layer)
        return sites | {site: partial(self._attention, pair, weights) for site, pair in pairs.items()}

    def _linear(self, layer: Layer, task: None, tokens: Tensor, output: Tensor) -> Tensor:
        return output + self._difference(layer, tokens).view(output.shape).to(output.dtype)

    def _attention(self, pair: list[Layer], weights: Mapping[str, Tensor], task: None, x: Tensor, output: Any) -> Any:
        """Self-attention anew: a hook sees no values between its two matrices."""
        into, out = pair
        query, key, value = (
            part.unflatten(-1, (into.attention, -1)).transpose(1, 2)
            for part in self._whole(into, weights, x).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self._whole(out, weights, mixed), None

    def _whole(self, layer: Layer, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        plain = F.linear(tokens, weights[layer.weight], None if layer.bias is None else weights[layer.bias])
        return plain + self._difference(layer, tokens).to(plain.dtype)

    def _difference(self, layer: Layer, tokens: Tensor) -> Tensor:
        """Σₜ gₜ Dₜ x, [B, N, out]."""
        rows = as_tokens(tokens)
        right, left = (self.frozen[f"{layer.weight}.{side}"] for side in ("right", "left"))
        gates = self.gates(layer, rows)
        inner = (rows.float() @ right.flatten(0, 1).mT).unflatten(-1, right.shape[:2]) * gates[..., None]
        mixed = inner.flatten(-2) @ left.transpose(1, 2).flatten(0, 1)
        return mixed if layer.bias is None else mixed + gates @ self.frozen[layer.bias]


def pretrained(backbone: MergedBackbone, name: str) -> Tensor:
    """θ₀ of a parameter; a view, where the bank lies."""
    experts = backbone.experts
    return experts.pretrained[experts.layout.slices[experts.names.index(name)]].view(experts.of(name).shape[1:])
