"""Σₜ gₜ(x) τₜ x for a batch whose images have gates of their own, without a weight per image in memory.

Two ways to the same product, Aₜ = τₜ of a layer: Σₜ gₜ (Aₜ x) takes T products of all tokens; (Σₜ gₜ Aₜ) x takes one,
and T/N of one more to mix the matrix of an image of N tokens. The second is a fifth of the work on a ViT-B/32, whose
images have 50 tokens. It is done for a few images at a time, forwards and backwards, so that what is alive is one
small buffer, and the gradient in the gates comes from ∂L/∂A of an image, which is in that buffer as well:
∂L/∂gₜ = ⟨Aₜ, ∂L/∂A⟩.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaptive_merge.adapters.route import as_tokens

__all__ = ["BUFFER", "mixed_product"]

# Releases of torch before 2.7 say it of compiling and exporting together.
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

BUFFER: Final = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Entries of mixed weights that are alive at a time; one image's at least."""


def mixed_product(tokens: Tensor, gates: Tensor, vectors: Tensor) -> Tensor:
    """Σₜ gₜ τₜ x; differentiable in tokens and gates, while the vectors are frozen.

    Args:
        tokens: x, [B, N, in], or [B, in].
        gates: g, [B, T].
        vectors: τ of a layer, [T, out, in].

    Returns:
        [B, N, out], or [B, out].
    """
    rows = as_tokens(tokens)
    if _exporting():  # a graph has neither loops over the batch nor backward functions
        products = torch.einsum("bni,toi->bnto", rows, vectors)
        mixed = torch.einsum("bnto,bt->bno", products, gates)
    else:
        mixed = _Mixed.apply(rows, gates.to(rows.dtype), vectors.to(rows.dtype))
    return mixed.view(*tokens.shape[:-1], vectors.shape[1])


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, gates: Tensor, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, gates, vectors)
        flat = vectors.flatten(1)
        parts = [
            torch.bmm(tokens[cut], (gates[cut] @ flat).view(-1, *vectors.shape[1:]).mT) for cut in _cuts(gates, vectors)
        ]
        return torch.cat(parts) if parts else tokens.new_empty(*tokens.shape[:2], vectors.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, gates, vectors = ctx.saved_tensors
        flat, gradient = vectors.flatten(1), gradient.contiguous()
        to_tokens = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        to_gates = torch.empty_like(gates)
        for cut in _cuts(gates, vectors):
            if to_tokens is not None:
                to_tokens[cut] = torch.bmm(gradient[cut], (gates[cut] @ flat).view(-1, *vectors.shape[1:]))
            to_gates[cut] = torch.bmm(gradient[cut].mT, tokens[cut]).flatten(1) @ flat.T
        return to_tokens, to_gates, None


def _cuts(gates: Tensor, vectors: Tensor) -> Iterator[slice]:
    size = max(BUFFER.get(gates.device.type, BUFFER["cpu"]) // vectors[0].numel(), 1)
    return (slice(start, start + size) for start in range(0, len(gates), size))
