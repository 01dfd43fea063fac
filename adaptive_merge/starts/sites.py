"""Sites: the linear maps, norms and statistics of a tower that a start can solve, and what is seen at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Layer", "Seen", "Site", "Weights"]

Weights = Mapping[str, Tensor]
Kind = Literal["linear", "conv", "norm", "statistics"]


class Layer(NamedTuple):
    """The weights of one site.

    Linear maps and unfolded convolutions: weight [out, in] and bias [out] or None. Norms: scale and shift [d].
    Statistics: running mean and variance [d].
    """

    weight: Tensor
    bias: Tensor | None

    @property
    def shift(self) -> Tensor:
        """The bias [out]; zeros where there is none."""
        return self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias

    def double(self) -> Layer:
        """The same in float64."""
        return Layer(self.weight.double(), None if self.bias is None else self.bias.double())


# Scalars on the CPU go with tensors on any device.
_ZERO, _ONE = torch.zeros(()), torch.ones(())


@dataclass
class Seen:
    """What one model has at a site for a batch.

    Args:
        x: input of the map; for a norm the normalised input before scale and shift.
        output: computes the map's output; not every method asks for every model's.
        before: the residual stream that the map writes to, before it; 0 where it writes to none.
        scale: what the output is multiplied by on its way into the stream (LayerScale).
    """

    x: Tensor
    output: Callable[[], Tensor]
    before: Tensor = _ZERO
    scale: Tensor = _ONE

    @cached_property
    def y(self) -> Tensor:
        """Output of the map."""
        return self.output()

    @property
    def after(self) -> Tensor:
        """The residual stream after the map."""
        return self.before + self.scale * self.y


@dataclass(frozen=True)
class Site:
    """One map of the tower, by the names of its parameters.

    Args:
        name: unique in the tower.
        weights: names of the weights, stacked along the outputs where there are several.
        biases: names of the biases likewise; empty where there are none.
        kind: linear map, convolution, norm, or the running statistics of a BatchNorm.
        rows: the part of the stacked outputs that is this site; None stands for all.
        transposed: whether the weight is stored as [in, out].
        class_only: whether nothing but the class token's output here reaches the features.
        stream: whether the output is added to the residual stream.
        patches: unfolds the inputs of a convolution.
    """

    name: str
    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()
    kind: Kind = "linear"
    rows: tuple[int, int] | None = None
    transposed: bool = False
    class_only: bool = False
    stream: bool = False
    patches: nn.Unfold | None = None

    def read(self, weights: Weights) -> Layer:
        """The site's layer in a model."""
        weight = _stacked([weights[name] for name in self.weights], self.rows)
        weight = weight.T if self.transposed else weight.flatten(1) if self.kind == "conv" else weight
        return Layer(weight, _stacked([weights[name] for name in self.biases], self.rows) if self.biases else None)

    def write(self, weights: Weights, layer: Layer) -> None:
        """Put a layer into the model's tensors, in place."""
        weight = layer.weight.T if self.transposed else layer.weight
        _unstack([weights[name] for name in self.weights], self.rows, weight)
        if layer.bias is not None:
            _unstack([weights[name] for name in self.biases], self.rows, layer.bias)

    def rows_of(self, seen: Tensor, width: int) -> Tensor:
        """An input of `width` entries as a matrix [n, width]: a row a token, or a row a patch of a convolution."""
        rows = seen if self.patches is None else self.patches(seen).transpose(1, 2)
        return rows.reshape(-1, width)

    def outputs_of(self, seen: Tensor) -> Tensor:
        """An output as a matrix [n, out], row for row as `rows_of`."""
        if self.kind == "conv" or (self.kind == "statistics" and seen.dim() > 2):
            seen = seen.flatten(2).transpose(1, 2)
        return seen.reshape(-1, seen.shape[-1])


def _stacked(tensors: list[Tensor], rows: tuple[int, int] | None) -> Tensor:
    whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    return whole if rows is None else whole[rows[0] : rows[1]]


def _unstack(tensors: list[Tensor], rows: tuple[int, int] | None, value: Tensor) -> None:
    if rows is not None:
        tensors = [tensors[0][rows[0] : rows[1]]]
    sizes = [len(tensor) for tensor in tensors]
    for tensor, part in zip(tensors, value.split(sizes)):
        tensor.copy_(part.reshape(tensor.shape))
