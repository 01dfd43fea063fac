"""The engine: walks a tower block by block, sums up what the images say at each site, and solves it.

Held at a time: the merged weights, one block of every expert, each task's activations at the block's boundary (one
path through the merged model, one through its expert), and the sums of the sites that are being solved.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import without_weights
from adaptive_merge.starts.base import Problem, Solution, Start
from adaptive_merge.starts.families import describe
from adaptive_merge.starts.sites import Layer, Seen, Site
from adaptive_merge.starts.sums import Sums
from adaptive_merge.starts.systems import Statistics, System
from adaptive_merge.starts.tower import Block

__all__ = ["ClosedForm", "Pair"]

DIMENSIONS = 6
"""Of a batch of images, at most."""

View = Literal["merged", "expert", "crossed"]
"""The merged model on its own path; the expert on its own; the expert's block on the merged model's path."""

Tensors = Mapping[str, Tensor]

States = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Gives the (merged, expert) states at the beginning of a block, batch by batch."""


class Pair(NamedTuple):
    """What a site's map is asked to do with a batch: inputs [n, in] and outputs [n, out]."""

    x: Tensor
    y: Tensor


class ClosedForm(Start):
    """A start that solves the tower's sites one after another; methods differ in the choices below."""

    views: ClassVar[tuple[View, ...]] = ("merged", "expert")
    """What is looked at."""

    layer_by_layer: ClassVar[bool] = False
    """Whether a site sees those before it in its block solved; otherwise a block is solved at once."""

    other_tokens: float = 1.0
    """Weight of the tokens whose outputs do not reach the features, where the class token's alone do."""

    def initial(self, problem: Problem) -> Tensor:
        """Weights [P] of what is not solved, and of what is not solved yet."""
        return problem.anchor

    def pull(self, problem: Problem) -> Tensor:
        """Weights [P] that solutions are drawn to."""
        return problem.anchor

    def solves(self, site: Site, block: Block) -> bool:
        """Whether a site is solved; by default every linear map, and convolutions where nothing else is known."""
        return site.kind == "linear" or (site.kind == "conv" and not block.advances)

    @abstractmethod
    def system(self, site: Site, anchor: Layer, pretrained: Layer) -> System:
        """The empty system of a site."""

    def outputs(self, site: Site, expert: Layer) -> int:
        """Columns of the targets that `pair` gives."""
        return len(expert.weight)

    def output_grams(
        self, problem: Problem, task: str, path: Sequence[Block], sites: Sequence[Site], states: States
    ) -> dict[Site, Tensor]:
        """Grams [out, out] of the gradients at the sites' outputs in a task's expert, for methods that ask for them.

        Args:
            problem, task: of whose expert.
            path: the blocks from that of the sites to the last.
            sites: those to look at.
            states: gives the (merged, expert) states at the beginning of `path`, batch by batch.
        """
        return {}

    @abstractmethod
    def pair(self, site: Site, seen: Mapping[View, Seen], expert: Layer) -> Pair:
        """The inputs and targets of a batch of one task; `expert` is the site's layer in its expert."""

    @torch.no_grad()
    def solve(self, problem: Problem) -> Solution:
        return _Walk(self, problem).run()


class _Walk:
    """One pass through the tower."""

    def __init__(self, method: ClosedForm, problem: Problem) -> None:
        self.method, self.problem, self.tasks = method, problem, problem.experts.tasks
        layout, bank = problem.experts.layout, problem.experts
        self.flat = method.initial(problem).detach().float().to(problem.anchor.device, copy=True)
        self.buffers = {name: buffer.clone() for name, buffer in problem.buffers.items()}
        self.merged = layout.unflatten(self.flat) | self.buffers
        self.pull = layout.unflatten(method.pull(problem))
        self.pretrained = layout.unflatten(bank.pretrained.to(self.flat.device))
        self.blocks = describe(without_weights(problem.backbone), self._example(), self.merged)
        if method.layer_by_layer:
            self.blocks = tuple(part for block in self.blocks for part in block.parts())
        self.identity = problem.identity(method) if problem.store else ""
        self.estimated: dict[str, Tensor] = {}
        # Each task's batches at the boundary, as (merged, expert); None: the images themselves.
        self.states: dict[str, list[tuple[Any, Any]] | None] = dict.fromkeys(self.tasks)

    def run(self) -> Solution:
        done = self._resume()
        for number, block in enumerate(self.blocks):
            self._block(block, solved=number < done)
            if number >= done:
                self._keep(number + 1)
            if self.problem.progress:
                self.problem.progress(number + 1, len(self.blocks))
        return Solution(self.flat, self.estimated)

    def _block(self, block: Block, solved: bool) -> None:
        groups = [] if solved else self._groups(block)
        moves = block.advances and block is not self.blocks[-1]
        if not groups and not moves:
            return
        # What is needed once is not held: a layer of a tower that is not known is seen through a whole expert.
        experts = _Experts(self.problem, block, held=len(groups) + moves > 1)
        for group in groups:
            self._solve(block, group, experts)
        if moves:
            for task in self.tasks:
                self._advance(block, task, experts[task])

    def _groups(self, block: Block) -> list[list[Site]]:
        """The sites to solve, those that are solved at once together."""
        wanted = [[site for site in sites if self._solves(site, block)] for sites in block.sites]
        wanted = [sites for sites in wanted if sites]
        if self.method.layer_by_layer or not wanted:
            return wanted
        return [[site for sites in wanted for site in sites]]

    def _solves(self, site: Site, block: Block) -> bool:
        return site.kind == "statistics" or self.method.solves(site, block)

    def _solve(self, block: Block, sites: list[Site], experts: _Experts) -> None:
        systems = {site: self._system(site) for site in sites}
        for task in self.tasks:
            expert = experts[task]
            sums = {site: Sums(entrywise=site.kind in ("norm", "statistics")) for site in sites}
            for merged_state, expert_state in self._states(task):
                seen = self._observe(block, sites, expert, merged_state, expert_state)
                for site in sites:
                    self._add(sums[site], site, {view: record[site.name] for view, record in seen.items()}, expert)
            grams = self._output_grams(block, sites, task)
            for site, system in systems.items():
                self._finish(task, site, sums[site], system, site.read(expert), grams.get(site))
        for site, system in systems.items():
            self._write(site, system.solution())

    def _system(self, site: Site) -> System:
        if site.kind == "statistics":
            return Statistics(site.read(self.merged))
        return self.method.system(site, site.read(self.pull), site.read(self.pretrained))

    def _observe(
        self, block: Block, sites: list[Site], expert: Tensors, merged_state: Tensor, expert_state: Tensor
    ) -> dict[View, dict[str, Seen]]:
        names = {site.name for site in sites}
        views = ("merged",) if sites[0].kind == "statistics" else self.method.views
        models = {
            "merged": (self.merged, merged_state),
            "expert": (expert, expert_state),
            # Where a block begins at the images, no expert can be put on the merged path; its layer's input is there.
            "crossed": (expert, merged_state) if block.advances else (self.merged, merged_state),
        }
        return {view: block.observe(*models[view], names) for view in views}

    def _add(self, sums: Sums, site: Site, seen: Mapping[View, Seen], expert: Tensors) -> None:
        if site.kind == "statistics":
            x = site.outputs_of(seen["merged"].x)
            sums.add(x, x)
            return
        x, y = self.method.pair(site, seen, site.read(expert))
        sums.add(x, y, self._token_weights(site, next(iter(seen.values())).x))

    def _token_weights(self, site: Site, x: Tensor) -> Tensor | None:
        """[n], where the class token is not worth the same as the others."""
        if not site.class_only or self.method.other_tokens == 1 or x.dim() < 3:
            return None
        weights = x.new_full(x.shape[:2], self.method.other_tokens)
        weights[:, 0] = 1
        return weights.flatten()

    def _output_grams(self, block: Block, sites: list[Site], task: str) -> dict[Site, Tensor]:
        path = self.blocks[self.blocks.index(block) :] if block.advances else (block,)
        wanted = [site for site in sites if site.kind != "statistics"]
        grams = self.method.output_grams(self.problem, task, path, wanted, lambda: self._states(task))
        return {site: self.problem.reduce(gram) for site, gram in grams.items()}

    def _finish(
        self, task: str, site: Site, sums: Sums, system: System, expert: Layer, output_gram: Tensor | None
    ) -> None:
        sums.blank(expert.weight.shape[-1], self.method.outputs(site, expert), self.flat.device)
        moments = sums.moments(self.problem.reduce)
        if not moments.tokens > 0:
            raise InputError(f"`images` has no image of task {task!r}; give at least one, or leave the task out")
        system.add(moments._replace(output_gram=output_gram), expert)

    def _write(self, site: Site, layer: Layer) -> None:
        site.write(self.merged, layer)
        if site.kind == "statistics":
            self.estimated |= {name: self.buffers[name] for name in (*site.weights, *site.biases)}

    def _states(self, task: str) -> Iterator[tuple[Tensor, Tensor]]:
        kept = self.states[task]
        return ((batch, batch) for batch in self.problem.batches(task)) if kept is None else iter(kept)

    def _advance(self, block: Block, task: str, expert: Tensors) -> None:
        own = "expert" in self.method.views
        follows = self.method.views != ("expert",)
        states = []
        for merged, experts_own in self._states(task):
            ahead = block.advance(self.merged, merged) if follows else None
            states.append((ahead, block.advance(expert, experts_own) if own else None))
        self.states[task] = states

    def _example(self) -> Tensor:
        """A batch of this process; where it has none, a blank image of the others' shape."""
        batch = next((batch for task in self.tasks for batch in self.problem.batches(task)), None)
        shape = (0,) * DIMENSIONS if batch is None else (1, *batch.shape[1:], *(0,) * (DIMENSIONS - batch.dim()))
        count, *sizes = self.problem.reduce(torch.tensor(shape, dtype=torch.float64, device=self.flat.device)).tolist()
        if not count:
            raise InputError(
                f"`images` has no image of task {self.tasks[0]!r}, nor of another; give at least one of each"
            )
        return self.flat.new_zeros(1, *(round(size / count) for size in sizes if size)) if batch is None else batch

    def _resume(self) -> int:
        kept = self.problem.store.load(self.identity) if self.problem.store else None
        if not kept:
            return 0
        done, tensors = kept
        self.flat.copy_(tensors["weights"])
        for name in tensors.keys() - {"weights"}:
            self.estimated[name] = self.buffers[name].copy_(tensors[name])
        return done

    def _keep(self, done: int) -> None:
        if self.problem.store:
            self.problem.store.save(self.identity, done, {"weights": self.flat} | self.estimated)


class _Experts:
    """One block of every expert: made once where it is held, and when it is asked for where it is not."""

    def __init__(self, problem: Problem, block: Block, held: bool) -> None:
        self.problem, self.block = problem, block
        self.made = {task: self._make(task) for task in problem.experts.tasks} if held else {}

    def __getitem__(self, task: str) -> Tensors:
        return self.made.get(task) or self._make(task)

    def _make(self, task: str) -> Tensors:
        return self.problem.tower(task, self.block.parameters)
