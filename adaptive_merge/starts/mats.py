"""MaTS: matching models in their task subspaces, by conjugate gradients from the anchor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from adaptive_merge.adapters.heads import Head
from adaptive_merge.errors import InputError
from adaptive_merge.starts.base import Problem
from adaptive_merge.starts.engine import ClosedForm, Pair, States, View
from adaptive_merge.starts.predictions import answers, as_features, heads_of, label_weights
from adaptive_merge.starts.sites import Layer, Seen, Site, Weights
from adaptive_merge.starts.sums import Moments
from adaptive_merge.starts.systems import System
from adaptive_merge.starts.tower import Block

__all__ = ["MaTS", "conjugate_gradients"]

Form = Literal["gram", "block"]
# Relative to the right-hand side; in float64 nothing is gained beyond.
TOLERANCE = 1e-10


class MaTS(ClosedForm):
    """MaTS (Tam et al., TMLR 2024): Σ_t G_t Wᵀ S_t = Σ_t G_t W_tᵀ S_t by conjugate gradients, started at the anchor.

    G_t is the Gram of a layer's inputs in expert t, S_t that of the gradients at its outputs: together the block of
    its Fisher information (K-FAC). What is no linear map, biases too, stays as in the anchor.

    Args:
        form: `"block"`, or `"gram"` with S_t = I, which needs no heads and leads to RegMean.
        iterations: of the conjugate gradients; fewer stay closer to the anchor.
        shrink: what off-diagonal entries of the G_t are multiplied by.
        samples: labels drawn a unit for S_t from the expert's own prediction; None: all classes.
    """

    views: ClassVar[tuple[View, ...]] = ("expert",)

    def __init__(
        self, form: Form = "gram", iterations: int = 100, shrink: float = 1.0, samples: int | None = 1
    ) -> None:
        if form not in get_args(Form):
            raise InputError(f"`form` is {' or '.join(map(repr, get_args(Form)))}, got {form!r}")
        if iterations < 1:
            raise InputError(f"`iterations` of the conjugate gradients is at least 1, got {iterations}")
        if not 0 <= shrink <= 1:
            raise InputError(f"`shrink` multiplies off-diagonal entries and lies between 0 and 1, got {shrink}")
        self.form, self.iterations, self.shrink, self.samples = form, iterations, shrink, samples

    def system(self, site: Site, anchor: Layer, pretrained: Layer) -> System:
        return MatchingSystem(anchor, self.iterations, self.shrink)

    def outputs(self, site: Site, expert: Layer) -> int:
        return 0  # the targets follow from the Grams

    def pair(self, site: Site, seen: Mapping[View, Seen], expert: Layer) -> Pair:
        x = site.rows_of(seen["expert"].x, expert.weight.shape[-1])
        return Pair(x, x[:, :0])

    def output_grams(
        self, problem: Problem, task: str, path: Sequence[Block], sites: Sequence[Site], states: States
    ) -> dict[Site, Tensor]:
        """S_t [out, out] of the sites, float64; of the first block of `path`, which leads to the features."""
        if self.form == "gram" or not sites:
            return {}
        expert, head = problem.tower(task), heads_of(problem)[task]
        sizes = {site: len(site.read(expert).weight) for site in sites}
        totals = {site: problem.anchor.new_zeros(size, size, dtype=torch.float64) for site, size in sizes.items()}
        for number, (_, state) in enumerate(states()):
            for site, gram in self._batch(expert, head, path, sites, state, f"{task} {number}").items():
                totals[site] = totals[site] + gram
        return totals

    @torch.enable_grad()
    def _batch(
        self, expert: Weights, head: Head, path: Sequence[Block], sites: Sequence[Site], state: Tensor, key: str
    ) -> dict[Site, Tensor]:
        end, seen = path[0].trace(expert, state.detach().clone().requires_grad_(), [site.name for site in sites])
        for block in path[1:]:
            end = block.advance(expert, end)
        logits = answers(head, as_features(end))
        share, log = label_weights(logits, self.samples, key), logits.log_softmax(-1)
        outputs = [seen[site.name].y for site in sites]
        totals: dict[Site, Tensor] = {}
        for unit, label in share.sum(0).nonzero():
            # An image's label weighs its square, and images do not mix: the root of the weight goes into the sum.
            total = (share[:, unit, label].sqrt() * log[:, unit, label]).sum()
            gradients = torch.autograd.grad(total, outputs, retain_graph=True)
            for site, gradient in zip(sites, gradients):
                rows = site.outputs_of(gradient)
                gram = (rows.T @ rows).double()
                totals[site] = totals[site] + gram if site in totals else gram
        return totals


class MatchingSystem(System):
    """Σ_t G_t X S_t = Σ_t G_t W_tᵀ S_t for X = Wᵀ; holds every task's two Grams until it is solved.

    Args:
        anchor, iterations, shrink: as for `MaTS`.
    """

    def __init__(self, anchor: Layer, iterations: int, shrink: float) -> None:
        super().__init__(anchor)
        self.iterations, self.shrink = iterations, shrink
        self.terms: list[tuple[Tensor, Tensor | None]] = []
        self.right = torch.zeros_like(self.anchor.weight.T)

    def add(self, moments: Moments, expert: Layer) -> None:
        gram = moments.gram * self.shrink
        gram.diagonal().copy_(moments.gram.diagonal())
        outputs = moments.output_gram
        self.terms.append((gram, outputs))
        self.right = self.right + _between(gram, expert.weight.double().T, outputs)

    def solution(self) -> Layer:
        def product(x: Tensor) -> Tensor:
            return torch.stack([_between(gram, x, outputs) for gram, outputs in self.terms]).sum(0)

        solved = conjugate_gradients(product, self.right, self.anchor.weight.T, self.iterations)
        return Layer(solved.T, self.anchor.bias)


def _between(gram: Tensor, x: Tensor, outputs: Tensor | None) -> Tensor:
    return gram @ x if outputs is None else gram @ x @ outputs


def conjugate_gradients(product: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, iterations: int) -> Tensor:
    """x with product(x) = right, for a product that is symmetric and positive (Hestenes & Stiefel, 1952)."""
    x, residual = start.clone(), right - product(start)
    direction, square = residual.clone(), residual.square().sum()
    enough = TOLERANCE**2 * right.square().sum()
    for _ in range(iterations):
        if square <= enough:
            break
        image = product(direction)
        step = square / (direction * image).sum()
        x, residual = x + step * direction, residual - step * image
        square, before = residual.square().sum(), square
        direction = residual + square / before * direction
    return x
