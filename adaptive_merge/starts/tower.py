"""A tower as the engine walks it: blocks in forward order, each of which knows its sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive_merge.starts.sites import Seen, Site, Weights

__all__ = ["Block", "Chain", "Hooked", "Step"]


class Block(ABC):
    """A part of the tower between two places where activations are kept."""

    parameters: tuple[str, ...]
    """Names of the parameters that it reads."""

    sites: tuple[tuple[Site, ...], ...]
    """Its sites in order of execution; those that share an input are together."""

    advances: bool = True
    """Whether `advance` leads on; otherwise every block starts from the images."""

    @abstractmethod
    def observe(self, weights: Weights, state: Any, wanted: Collection[str]) -> dict[str, Seen]:
        """What a model of these weights has at the wanted sites; runs no further than to the last of them."""

    @abstractmethod
    def trace(self, weights: Weights, state: Any, wanted: Collection[str]) -> tuple[Any, dict[str, Seen]]:
        """The state at the end of the block, and what was seen on the way."""

    def advance(self, weights: Weights, state: Any) -> Any:
        """The state at the end of the block."""
        return self.trace(weights, state, ())[0]

    def parts(self) -> tuple[Block, ...]:
        """Smaller blocks that do the same one after another, where activations may as well be kept."""
        return (self,)


class State(NamedTuple):
    """The residual stream [B, N, d], and what is computed beside it."""

    stream: Tensor
    x: Tensor


class Step(ABC):
    """One operation of a chain."""

    sites: tuple[Site, ...] = ()

    def look(self, weights: Weights, state: State) -> dict[str, Seen]:
        """What a model has at the step's sites."""
        return {}

    @abstractmethod
    def run(self, state: State, seen: Mapping[str, Seen]) -> State:
        """The state after it, where `seen` is what its sites have."""


class Norm(Step):
    """LayerNorm of the stream."""

    def __init__(self, site: Site, eps: float) -> None:
        self.sites, self.eps = (site,), eps

    def look(self, weights: Weights, state: State) -> dict[str, Seen]:
        (site,) = self.sites
        layer = site.read(weights)
        norm = partial(F.layer_norm, state.stream, layer.weight.shape, eps=self.eps)
        return {site.name: Seen(norm(), partial(norm, weight=layer.weight, bias=layer.bias))}

    def run(self, state: State, seen: Mapping[str, Seen]) -> State:
        return State(state.stream, seen[self.sites[0].name].y)


@dataclass(frozen=True)
class Linear(Step):
    """Linear maps of one input, their outputs side by side; or one that adds to the stream, scaled or not."""

    sites: tuple[Site, ...]
    scale: str | None = None

    def look(self, weights: Weights, state: State) -> dict[str, Seen]:
        seen = {site.name: Seen(state.x, partial(F.linear, state.x, *site.read(weights))) for site in self.sites}
        if self.sites[0].stream:
            written = seen[self.sites[0].name]
            written.before = state.stream
            written.scale = weights[self.scale] if self.scale else written.scale
        return seen

    def run(self, state: State, seen: Mapping[str, Seen]) -> State:
        parts = [seen[site.name] for site in self.sites]
        outputs = parts[0].y if len(parts) == 1 else torch.cat([part.y for part in parts], -1)
        return State(parts[0].after if self.sites[0].stream else state.stream, outputs)


@dataclass(frozen=True)
class Attention(Step):
    """Softmax attention of queries, keys and values side by side: [B, N, 3d] → [B, N, d]."""

    heads: int

    def run(self, state: State, seen: Mapping[str, Seen]) -> State:
        parts = state.x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*parts)
        return State(state.stream, out.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Activation(Step):
    """A module without parameters."""

    module: nn.Module

    def run(self, state: State, seen: Mapping[str, Seen]) -> State:
        return State(state.stream, self.module(state.x))


@dataclass(frozen=True)
class Pool(Step):
    """The stream becomes what the features are read from: its class token, or the mean of its patch tokens."""

    prefix: int
    mean: bool = False

    def run(self, state: State, seen: Mapping[str, Seen]) -> State:
        pooled = state.stream[:, self.prefix :].mean(1) if self.mean else state.stream[:, 0]
        return State(pooled, pooled)


@dataclass(frozen=True)
class Taken(Step):
    """What is beside the stream becomes the stream."""

    def run(self, state: State, seen: Mapping[str, Seen]) -> State:
        return State(state.x, state.x)


class Chain(Block):
    """Steps on a residual stream [B, N, d], which is its state.

    A chain of which nothing is added to the stream is the tower's tail: it ends in the features [B, d].

    Args:
        steps: in order.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)
        self.sites = tuple(step.sites for step in self.steps if step.sites)
        self.writes = any(site.stream for group in self.sites for site in group)
        names = [name for group in self.sites for site in group for name in (*site.weights, *site.biases)]
        names += [step.scale for step in self.steps if isinstance(step, Linear) and step.scale]
        self.parameters = tuple(dict.fromkeys(names))

    def parts(self) -> tuple[Chain, ...]:
        """Chains that end where this one writes to the stream: the stream alone leads from one to the next."""
        ends = [end for end, step in enumerate(self.steps, start=1) if any(site.stream for site in step.sites)]
        if not ends:
            return (self,)
        return tuple(Chain(self.steps[start:end]) for start, end in zip([0, *ends], ends))

    def observe(self, weights: Weights, state: Tensor, wanted: Collection[str]) -> dict[str, Seen]:
        at = State(state, state)
        record: dict[str, Seen] = {}
        for step in self.steps:
            seen = step.look(weights, at)
            record |= {name: value for name, value in seen.items() if name in wanted}
            if len(record) == len(wanted):
                break
            at = step.run(at, seen)
        return record

    def trace(self, weights: Weights, state: Tensor, wanted: Collection[str]) -> tuple[Tensor, dict[str, Seen]]:
        at = State(state, state)
        record: dict[str, Seen] = {}
        for step in self.steps:
            seen = step.look(weights, at)
            record |= {name: value for name, value in seen.items() if name in wanted}
            at = step.run(at, seen)
        return (at.stream if self.writes else at.x), record


class _Reached(Exception):
    """The forward has come as far as it has to."""


class Hooked(Block):
    """A part of any module, from its images to one of its submodules, seen through forward hooks.

    Args:
        module: the structure, in evaluation mode; its own weights are not read.
        sites: as for `Block`.
        parameters: names that the part reads.
        until: name of the submodule whose input is the block's output; None: the state stays the images.
    """

    def __init__(
        self, module: nn.Module, sites: Sequence[Site], parameters: Sequence[str], until: str | None = None
    ) -> None:
        self.module, self.until = module, until
        self.sites, self.parameters = tuple((site,) for site in sites), tuple(parameters)
        self.advances = until is not None

    def observe(self, weights: Weights, state: Tensor, wanted: Collection[str]) -> dict[str, Seen]:
        record: dict[str, Seen] = {}
        with self._watched(wanted, record, stop=True):
            self._forward(weights, state)
        return record

    def trace(self, weights: Weights, state: Tensor, wanted: Collection[str]) -> tuple[Any, dict[str, Seen]]:
        record: dict[str, Seen] = {}
        with self._watched(wanted, record, stop=False), self._stopped() as reached:
            output = self._forward(weights, state)
        return (reached[0] if self.until else output), record

    @contextmanager
    def _watched(self, wanted: Collection[str], record: dict[str, Seen], stop: bool) -> Iterator[None]:
        """Fills `record`; with `stop`, ends the forward with the last site that is wanted."""
        sites = {site.name: site for (site,) in self.sites if site.name in wanted}

        def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            record[name] = Seen(_input(sites[name], module, inputs[0]), lambda: output)
            if stop and len(record) == len(sites):
                raise _Reached

        handles = [self.module.get_submodule(name).register_forward_hook(partial(look, name)) for name in sites]
        with _removed(handles):
            yield

    @contextmanager
    def _stopped(self) -> Iterator[list[Tensor]]:
        """Ends the forward at the input of `until` and gives it."""
        reached: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reached.append(args[0] if args else next(iter(kwargs.values())))
            raise _Reached

        module = self.module.get_submodule(self.until) if self.until else None
        with _removed([module.register_forward_pre_hook(keep, with_kwargs=True)] if module else []):
            yield reached

    def _forward(self, weights: Weights, images: Tensor) -> Any:
        try:
            return torch.func.functional_call(self.module, dict(weights), (images,))
        except _Reached:
            return None


def _input(site: Site, module: Any, x: Tensor) -> Tensor:
    if site.kind != "norm":
        return x
    return F.layer_norm(x, module.normalized_shape, None, None, module.eps)


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
