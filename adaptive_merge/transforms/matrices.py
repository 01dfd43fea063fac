"""Which tensors of a bank are matrices, how they are cut, and what spectral transforms do with each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = [
    "QKV",
    "RANK_TOLERANCE",
    "Piece",
    "average",
    "by_matrix",
    "check_qkv",
    "leading",
    "pieces",
    "polar",
    "stacked",
    "svd",
]

QKV = Literal["fused", "split"]
"""Whether `in_proj_weight` [3d, d] of attention counts as one matrix, or as the three of Q, K and V."""

# Weights are float32, so a difference of two of them has a noise of about 1e-7 of the weights in every direction.
RANK_TOLERANCE: Final = 1e-6


class Piece(NamedTuple):
    """A tensor of the bank, or a third of one: where it lies in the flat buffer, and whether it is a matrix."""

    part: slice
    shape: tuple[int, ...]
    matrix: bool


def check_qkv(qkv: QKV) -> QKV:
    """`qkv` itself.

    Raises:
        InputError: neither `"fused"` nor `"split"`.
    """
    if qkv not in ("fused", "split"):
        raise InputError(f"qkv is 'fused' (one matrix, as open_clip stores it) or 'split' (three), got {qkv!r}")
    return qkv


def pieces(layout: Layout, qkv: QKV = "fused", blocks_only: bool = False) -> Iterator[Piece]:
    """The tensors of a layout, in order; the queries, keys and values apart where `qkv="split"`.

    A matrix is what has two dimensions and is not called `text_projection`, as in the code of Iso-C and TSV-M:
    position embeddings and the output projection are among them.

    Args:
        layout: of the bank.
        qkv: how to cut `in_proj_weight`; its rows of Q, K and V follow each other.
        blocks_only: count only those in the numbered blocks: the weights of attention and MLP.

    Raises:
        InputError: `blocks_only`, and the layout has no repeated blocks.
    """
    if blocks_only:
        layout.depth("this transform")
    for name, shape, part, block in zip(layout.names, layout.shapes, layout.slices, layout.blocks):
        is_matrix = len(shape) == 2 and "text_projection" not in name and bool(block or not blocks_only)
        cuts = 3 if qkv == "split" and name.endswith("in_proj_weight") and shape[0] % 3 == 0 else 1
        cut_shape = (shape[0] // cuts, *shape[1:]) if cuts > 1 else shape
        size = math.prod(cut_shape)
        for start in range(part.start, part.stop, size):
            yield Piece(slice(start, start + size), cut_shape, is_matrix)


def average(tensors: Tensor) -> Tensor:
    """τₜ / T for tensors [T, …]: what sums to the plain mean."""
    return tensors / len(tensors)


@torch.no_grad()
def by_matrix(
    bank: TaskVectors,
    matrix: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor] = average,
    qkv: QKV = "fused",
    blocks_only: bool = False,
) -> TaskVectors:
    """The bank with each tensor transformed by itself; memory beyond the result is about one tensor's in float64.

    Args:
        bank: of T tasks; what no expert has moved stays zero and is not handed on.
        matrix: [T, m, n] of the bank's dtype → float64 [T, m, n], for matrices. It widens one task's at a time.
        other: [T, …] → [T, …], for everything else.
        qkv, blocks_only: see `pieces`.
    """
    result = torch.zeros_like(bank.vectors)
    for piece in pieces(bank.layout, qkv, blocks_only):
        columns = bank.vectors[:, piece.part]
        if columns.any():
            tensors = columns.view(-1, *piece.shape)
            rule = matrix if piece.matrix else other
            result[:, piece.part].view_as(tensors).copy_(rule(tensors))
    return bank.with_vectors(result)


def stacked(like: Tensor, rows: Iterable[Tensor]) -> Tensor:
    """float64 of the shape of `like` [T, …] from its rows as they come; `torch.stack` would hold them all twice."""
    made = torch.empty_like(like, dtype=torch.float64, memory_format=torch.contiguous_format)
    for place, row in zip(made, rows, strict=True):
        place.copy_(row)
    return made


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin U [m, r], S [r], Vᵀ [r, n] of a matrix [m, n], r = min(m, n), in float64.

    Now and then LAPACK's divide and conquer does not converge on matrices of low rank; then it is `leading`, all of it.
    """
    matrix = matrix.double()
    try:
        if matrix.shape[0] < matrix.shape[1]:
            # LAPACK takes half the time on tall matrices.
            v, s, ut = torch.linalg.svd(matrix.T, full_matrices=False)
            return ut.T, s, v.T
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        u, s, v = leading(matrix, min(matrix.shape))
        return u, s, v.T


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` left vectors [m, k], singular values [k] and right vectors [n, k] of a matrix, in float64.

    From the eigenvectors of its Gram matrix, in half the time of a decomposition. Directions that the matrix does not
    have, up to `RANK_TOLERANCE`, are arbitrary on one side and not of length 1 on the other.
    """
    if matrix.shape[0] < matrix.shape[1]:
        v, s, u = leading(matrix.T, count)
        return u, s, v
    matrix = matrix.double()
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    v = vectors[:, vectors.shape[1] - count :].flip(1)
    u = matrix @ v
    s = u.norm(dim=0)  # of small values more exact than the roots of the eigenvalues
    return torch.where(s > 0, u / s, 0.0), s, v


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows): P Qᵀ of P S Qᵀ.

    Directions that the matrix does not have stay zero: there P and Q are whatever the solver leaves.
    """
    p, s, qt = svd(matrix)
    return (p * (s > RANK_TOLERANCE * s.max())) @ qt
