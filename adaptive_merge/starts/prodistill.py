"""ProDistill: coefficients entry by entry, learned one transformer block after another from the experts' features."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import without_weights
from adaptive_merge.starts.base import Problem, Solution, Start
from adaptive_merge.starts.families import describe
from adaptive_merge.starts.tower import Block

__all__ = ["ProDistill"]

Granularity = Literal["element", "tensor", "task"]


class ProDistill(Start):
    """ProDistill (ICML 2025; Scalable_Model_Merging_with_Progressive_Layerwise_Distillation c773fca).

    In every transformer block, front to back, θ = θ₀ + Σ_t α_t ⊙ τ_t, where the α_t minimise by Adam

        Σ_t Σ_{x of task t} ‖f(x; θ) − f(y; θ₀ + τ_t)‖²    (a sum over samples, tokens and dimensions)

    for the block f, its input x through the merged blocks before it and y through those of expert t. What is outside
    the blocks stays as in the anchor; the paper's is task arithmetic of .3. Held at a time: one block's τ and α with
    its gradient and Adam's two moments [T, entries of the block], and all samples' activations at its boundary.
    Processes gather the images and all compute the same, bit for bit what one would; they are no faster.

    Args:
        granularity: one coefficient of each task for every entry of a block, for every tensor, or for all of it.
        init: α before the first step.
        epochs: passes through all tasks' samples, in each block.
        lr: of Adam, with its default betas.
        batch_size: samples a step, of all tasks mixed.
        seed: of the order of the samples.
    """

    def __init__(
        self,
        granularity: Granularity = "element",
        init: float = 0.3,
        epochs: int = 100,
        lr: float = 1e-2,
        batch_size: int = 128,
        seed: int = 0,
    ) -> None:
        if granularity not in get_args(Granularity):
            raise InputError(f"`granularity` is one of {', '.join(get_args(Granularity))}, got {granularity!r}")
        for name, value in {"epochs": epochs, "batch_size": batch_size}.items():
            if value < 1:
                raise InputError(f"`{name}` is at least 1, got {value}")
        if not 0 < lr < math.inf:
            raise InputError(f"`lr` is Adam's step, a number above 0, got {lr}")
        if not math.isfinite(init):
            raise InputError(f"`init` is a finite number, got {init}")
        self.granularity, self.init, self.epochs = granularity, init, epochs
        self.lr, self.batch_size, self.seed = lr, batch_size, seed

    @torch.no_grad()
    def solve(self, problem: Problem) -> Solution:
        return _Walk(self, problem).run()

    def distil(self, number: int, share: _Share, block: Block, x: Tensor, target: Tensor) -> Tensor:
        """The block's weights [P_block] after all epochs.

        Args:
            number: of the block; with the seed it decides the order of the samples.
            share: the bank's part that the block reads.
            block: f.
            x, target: inputs and targets [N, tokens, d].

        Raises:
            InputError: the weights have become infinite.
        """
        alpha = self._alpha(share).requires_grad_()
        optimiser = torch.optim.Adam([alpha], lr=self.lr)
        order = torch.Generator().manual_seed(_seed(self.seed, number))
        for _ in range(self.epochs):
            for rows in torch.randperm(len(x), generator=order).to(x.device).split(self.batch_size):
                with torch.enable_grad():
                    output = block.advance(share.named(self._merge(share, alpha)), x[rows])
                    loss = (output - target[rows]).square().sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        weights = self._merge(share, alpha.detach())
        if not weights.isfinite().all():
            raise InputError(f"ProDistill: block {number} has diverged; give a smaller `lr` than {self.lr}")
        return weights

    def _alpha(self, share: _Share) -> Tensor:
        """[T, P_block], [T, tensors] or [T, 1]."""
        columns = {"element": share.tau.shape[1], "tensor": len(share.sizes), "task": 1}[self.granularity]
        return share.tau.new_full((len(share.tau), columns), self.init)

    def _merge(self, share: _Share, alpha: Tensor) -> Tensor:
        if self.granularity == "tensor":
            alpha = alpha.repeat_interleave(share.sizes, 1, output_size=share.tau.shape[1])
        return share.pretrained + (alpha * share.tau).sum(0)


class _Share:
    """What a block reads of the bank: θ₀ [P_block] and τ [T, P_block], in float32."""

    def __init__(self, problem: Problem, block: Block) -> None:
        bank, device = problem.experts, problem.anchor.device
        where = dict(zip(bank.names, zip(bank.layout.slices, bank.layout.shapes)))
        self.names = block.parameters
        self.parts, self.shapes = zip(*(where[name] for name in self.names))
        self.pretrained = self._of(bank.pretrained).to(device)
        self.tau = torch.stack([self._of(row).to(device).float() for row in bank.vectors])
        self.sizes = torch.tensor([part.stop - part.start for part in self.parts], device=device)

    def _of(self, flat: Tensor) -> Tensor:
        return torch.cat([flat[part] for part in self.parts])

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Name → parameter, as views of weights [P_block]."""
        parts = weights.split([part.stop - part.start for part in self.parts])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes)}

    def write(self, flat: Tensor, weights: Tensor) -> None:
        """Put weights [P_block] where they belong in `flat` [P]."""
        for part, values in zip(self.parts, self.named(weights).values()):
            flat[part] = values.flatten()


class _Walk:
    """One pass through the tower."""

    def __init__(self, method: ProDistill, problem: Problem) -> None:
        self.method, self.problem, self.tasks = method, problem, problem.experts.tasks
        self.flat = problem.anchor.detach().float().clone()
        self.merged = problem.experts.layout.unflatten(self.flat) | problem.buffers
        example = _gathered(problem, self.tasks[0])
        self.blocks = describe(without_weights(problem.backbone), example, self.merged)
        if not self.blocks[0].advances:
            raise InputError(
                "ProDistill learns the blocks of a vision transformer of open_clip, Hugging Face CLIP or timm, and the "
                "backbone is none that is known; take a start in closed form, such as CompensatedRegression"
            )
        self.identity = problem.identity(method) if problem.store else ""

    def run(self) -> Solution:
        stem, *blocks, _ = self.blocks
        done = self._resume()
        x, y, counts = self._stem(stem)
        self._report(1)
        for number, block in enumerate(blocks, start=1):
            targets = zip(self.tasks, y.split(counts))
            y = torch.cat([self._advance(block, self._expert(block, task), part) for task, part in targets])
            if number >= done:
                share = _Share(self.problem, block)
                share.write(self.flat, self.method.distil(number, share, block, x, y))
                self._keep(number + 1)
            x = self._advance(block, self.merged, x)
            self._report(number + 1)
        self._report(len(self.blocks))
        return Solution(self.flat)

    def _stem(self, stem: Block) -> tuple[Tensor, Tensor, list[int]]:
        """Activations [N, tokens, d] before the first block, merged and of each sample's expert; samples by task."""
        merged, own = [], []
        for task in self.tasks:
            images = _gathered(self.problem, task)
            merged.append(self._advance(stem, self.merged, images))
            own.append(self._advance(stem, self._expert(stem, task), images))
        return torch.cat(merged), torch.cat(own), [len(part) for part in own]

    def _expert(self, block: Block, task: str) -> dict[str, Tensor]:
        return self.problem.tower(task, block.parameters)

    def _advance(self, block: Block, weights: Mapping[str, Tensor], state: Tensor) -> Tensor:
        return torch.cat([block.advance(weights, part) for part in state.split(self.method.batch_size)])

    def _resume(self) -> int:
        kept = self.problem.store.load(self.identity) if self.problem.store else None
        if not kept:
            return 0
        self.flat.copy_(kept[1]["weights"])
        return kept[0]

    def _keep(self, done: int) -> None:
        if self.problem.store:
            self.problem.store.save(self.identity, done, {"weights": self.flat})

    def _report(self, done: int) -> None:
        if self.problem.progress:
            self.problem.progress(done, len(self.blocks))


def _gathered(problem: Problem, task: str) -> Tensor:
    """A task's images of all processes [N, …], in the order in which one process would have them.

    Raises:
        InputError: there is none.
    """
    batches = list(problem.batches(task))
    own = torch.cat(batches).float() if batches else problem.anchor.new_zeros(0, 0, 0, 0)
    header = torch.zeros(problem.world, own.dim(), dtype=torch.float64, device=own.device)
    header[problem.rank] = torch.tensor(own.shape)
    most, *shape = (header := problem.reduce(header)).amax(0).int().tolist()
    if not most:
        raise InputError(f"`images` has no image of task {task!r}; give at least one, or leave the task out")
    if problem.world == 1:
        return own
    slots = own.new_zeros(most, problem.world, *shape)
    if len(own):
        slots[: len(own), problem.rank] = own
    taken = torch.arange(most, device=own.device)[:, None] < header[:, 0]
    return problem.reduce(slots)[taken]


def _seed(seed: int, block: int) -> int:
    """Of a block's own order, so that a start goes on at any block."""
    return int.from_bytes(hashlib.sha256(f"{seed} {block}".encode()).digest()[:8], "little") >> 1
