"""Σₜ gₜ(x) τₜ x for a batch whose images have gates of their own, without a weight per image in memory.

Two ways to the same product, Aₜ = τₜ of a layer: Σₜ gₜ (Aₜ x) takes T products of all tokens; (Σₜ gₜ Aₜ) x takes one,
and T/N of one more to mix the matrix of an image of N tokens. The second is a fifth of the work on a ViT-B/32, whose
images have 50 tokens. It is done for some rows of some images' matrices at a time, forwards and backwards, in one
buffer that stays in the processor's cache: written once and read once, whole matrices would cost more than their
products. The gradient in the gates comes from ∂L/∂A of an image, which takes the place of the rows in the buffer:
∂L/∂gₜ = ⟨Aₜ, ∂L/∂A⟩.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive_merge.adapters.route import as_tokens

__all__ = ["BUFFER", "mixed_product"]

# Releases of torch before 2.7 say it of compiling and exporting together.
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

BUFFER: Final = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Entries of mixed weights that are alive at a time; a row's at least."""
ROWS: Final = 64
"""Rows of a matrix that are mixed at a time where they fit, before more images are: products of few rows are slow."""


def mixed_product(tokens: Tensor, gates: Tensor, vectors: Tensor) -> Tensor:
    """Σₜ gₜ τₜ x; differentiable in tokens and gates, while the vectors are frozen.

    Args:
        tokens: x, [B, N, in], or [B, in].
        gates: g, [B, T].
        vectors: τ of a layer, [T, out, in]; of any dtype, on any device.

    Returns:
        [B, N, out], or [B, out].
    """
    rows = as_tokens(tokens)
    if _exporting():  # a graph has neither loops over the batch nor backward functions
        products = torch.einsum("bni,toi->bnto", rows, vectors.to(rows))
        mixed = torch.einsum("bnto,bt->bno", products, gates)
    else:
        mixed = _Mixed.apply(rows, gates.to(rows.dtype), vectors)
    return mixed.view(*tokens.shape[:-1], vectors.shape[1])


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gates: Tensor, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, gates, vectors)
        mixed = tokens.new_empty(*tokens.shape[:2], vectors.shape[1])
        for images, rows, _, weights in _pieces(gates, vectors):
            mixed[images, :, rows] = torch.bmm(tokens[images], weights.mT)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, gates, vectors = ctx.saved_tensors
        gradient = gradient.contiguous()
        kind = torch.promote_types(tokens.dtype, torch.float32)  # of sums over rows
        to_tokens = torch.zeros_like(tokens, dtype=kind) if ctx.needs_input_grad[0] else None
        to_gates = torch.zeros_like(gates, dtype=kind)
        for images, rows, part, weights in _pieces(gates, vectors):
            own = gradient[images, :, rows]
            if to_tokens is not None:
                to_tokens[images] += torch.bmm(own, weights)
            torch.bmm(own.mT, tokens[images], out=weights)
            to_gates[images] += (part @ weights.flatten(1).mT).mT
        return None if to_tokens is None else to_tokens.to(tokens.dtype), to_gates.to(gates.dtype), None


def _pieces(gates: Tensor, vectors: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Images [b], rows [r], τ of the rows [T, r · in], and the images' mixtures of it [b, r, in] to be written over."""
    tasks, full, width = vectors.shape
    entries = BUFFER.get(gates.device.type, BUFFER["cpu"]) // width
    count = min(max(entries // ROWS, 1), max(len(gates), 1))
    height = min(max(entries // count, 1), full)
    buffer = gates.new_empty(count * height * width)
    for image, row in product(range(0, len(gates), count), range(0, full, height)):
        images, rows = slice(image, image + count), slice(row, row + height)
        part = vectors[:, rows].to(gates).flatten(1)
        weights = buffer[: len(gates[images]) * part.shape[1]].view(-1, part.shape[1])
        torch.mm(gates[images], part, out=weights)
        yield images, rows, part, weights.unflatten(1, (-1, width))
