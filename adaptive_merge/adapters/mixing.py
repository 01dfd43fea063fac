"""(W + Σₜ gₜ(x) τₜ) x for a batch whose images have gates of their own, without a weight per image in memory.

Two ways to the same product, Aₜ = τₜ of a layer: Σₜ gₜ (Aₜ x) takes T products of all tokens; (Σₜ gₜ Aₜ) x takes one,
and T/N of one more to mix the matrix of an image of N tokens. The second is a fifth of the work on a ViT-B/32, whose
images have 50 tokens, and W, as one more expert whose gate is 1, comes with it for 1/N. A tile of some images' matrices
is mixed at a time, forwards and backwards, in one buffer that stays in the processor's cache: written once and read
once, whole matrices would cost more than their products. The gradient in the gates comes from ∂L/∂A of an image, which
takes the place of the tile in the buffer: ∂L/∂gₜ = ⟨Aₜ, ∂L/∂A⟩.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from adaptive_merge.adapters.route import as_tokens

__all__ = ["TILES", "mixed_product"]

# Releases of torch before 2.7 say it of compiling and exporting together.
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

TILES: Final = {"cpu": (8, 128, 768), "cuda": (32, 1024, 4096)}
"""Images, rows and columns of the mixed matrices that are alive at a time, at most."""

_Tile = tuple[slice, slice, slice, Tensor, Tensor]


def mixed_product(tokens: Tensor, gates: Tensor, vectors: Tensor, weight: Tensor) -> Tensor:
    """(W + Σₜ gₜ τₜ) x; differentiable in tokens, gates and W, while the vectors are frozen.

    Args:
        tokens: x, [B, N, in], or [B, in].
        gates: g, [B, T].
        vectors: τ of a layer, [T, out, in]; of any dtype, on any device.
        weight: W, [out, in].

    Returns:
        [B, N, out], or [B, out].
    """
    rows, gates, weight = as_tokens(tokens), gates.to(tokens.dtype), weight.to(tokens.dtype)
    if _exporting():  # a graph has neither loops over the batch nor backward functions
        products = torch.einsum("bni,toi->bnto", rows, vectors.to(rows))
        mixed = F.linear(rows, weight) + torch.einsum("bnto,bt->bno", products, gates)
    else:
        mixed = _Mixed.apply(rows, gates, vectors, weight)
    return mixed.view(*tokens.shape[:-1], vectors.shape[1])


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gates: Tensor, vectors: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, gates, vectors, weight)
        mixed = tokens.new_zeros(*tokens.shape[:2], len(weight), dtype=_wide(tokens))
        for images, rows, columns, _, matrices in _tiles(gates, vectors, weight):
            mixed[images, :, rows] += torch.bmm(tokens[images, :, columns], matrices.mT)
        return mixed.to(tokens.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, gates, vectors, weight = ctx.saved_tensors
        to_tokens = torch.zeros_like(tokens, dtype=_wide(tokens)) if ctx.needs_input_grad[0] else None
        to_gates = gates.new_zeros(len(gates), gates.shape[1] + 1, dtype=_wide(tokens))
        for images, rows, columns, part, matrices in _tiles(gates, vectors, weight):
            own = gradient[images, :, rows]
            if to_tokens is not None:
                to_tokens[images, :, columns] += torch.bmm(own, matrices)
            torch.bmm(own.mT, tokens[images, :, columns], out=matrices)
            to_gates[images] += (part @ matrices.flatten(1).mT).mT
        to_weight = gradient.flatten(0, 1).mT @ tokens.flatten(0, 1) if ctx.needs_input_grad[3] else None
        to_tokens = None if to_tokens is None else to_tokens.to(tokens.dtype)
        return to_tokens, to_gates[:, :-1].to(gates.dtype), None, to_weight


def _wide(tokens: Tensor) -> torch.dtype:
    """The dtype in which tiles are summed."""
    return torch.promote_types(tokens.dtype, torch.float32)


def _tiles(gates: Tensor, vectors: Tensor, weight: Tensor) -> Iterator[_Tile]:
    """Images [b], rows [r], columns [c], τ and W of these [T + 1, r · c], and the images' matrices [b, r, c] to be
    written over.
    """
    full, width = weight.shape
    largest = TILES.get(gates.device.type, TILES["cpu"])
    count, height, breadth = map(min, largest, (max(len(gates), 1), full, width))
    gates = torch.cat([gates, gates.new_ones(len(gates), 1)], 1)
    buffer = gates.new_empty(count * height * breadth)
    for row, column in product(range(0, full, height), range(0, width, breadth)):
        rows, columns = slice(row, row + height), slice(column, column + breadth)
        place = weight[rows, columns]
        part = torch.cat([vectors[:, rows, columns].to(gates), place[None]]).flatten(1)
        for image in range(0, len(gates), count):
            images = slice(image, image + count)
            matrices = buffer[: len(gates[images]) * place.numel()].view(-1, place.numel())
            torch.mm(gates[images], part, out=matrices)
            yield images, rows, columns, part, matrices.unflatten(1, place.shape)
