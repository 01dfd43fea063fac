"""BatchNorm's running statistics anew, in merged weights that stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from adaptive_merge.errors import InputError
from adaptive_merge.starts.base import Problem, Solution
from adaptive_merge.starts.engine import ClosedForm, Pair, View
from adaptive_merge.starts.sites import Layer, Seen, Site
from adaptive_merge.starts.systems import System
from adaptive_merge.starts.tower import Block

__all__ = ["BatchStatistics"]


class BatchStatistics(ClosedForm):
    """Running means and variances as the merged model's own activations have them, each task counting the same.

    Averages of weights do not have the averages of the experts' statistics (Jordan et al., "REPAIR", ICLR 2023; the
    reset without rescaling). The weights are the anchor's, bit for bit.
    """

    views: ClassVar[tuple[View, ...]] = ("merged",)

    def solve(self, problem: Problem) -> Solution:
        solution = super().solve(problem)
        if not solution.buffers:
            raise InputError("BatchStatistics needs a backbone with BatchNorm layers; this one has none")
        return solution

    def solves(self, site: Site, block: Block) -> bool:
        return False

    # Of a tower without a site to solve nothing else is asked.
    def system(self, site: Site, anchor: Layer, pretrained: Layer) -> System:
        raise NotImplementedError

    def pair(self, site: Site, seen: Mapping[View, Seen], expert: Layer) -> Pair:
        raise NotImplementedError
