"""A tower as the engine walks it: blocks in forward order, each of which knows its sites."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    def advance(self, weights: Weights, state: Any) -> Any:
        """The state at the end of the block."""


class State(NamedTuple):
    """The residual stream [B, N, d], and what is computed beside it."""

    stream: Tensor
    x: Tensor | None = None


class Step(ABC):
    """One operation of a chain."""

    sites: tuple[Site, ...] = ()

    @abstractmethod
    def run(self, weights: Weights, state: State) -> tuple[State, dict[str, Seen]]:
        """The state after it, and what was seen at its sites."""


@dataclass(frozen=True)
class Norm(Step):
    """LayerNorm of the stream, or of what is beside it."""

    site: Site
    eps: float
    of_stream: bool = True

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def run(self, weights: Weights, state: State) -> tuple[State, dict[str, Seen]]:
        x = state.stream if self.of_stream else state.x
        layer = self.site.read(weights)
        z = F.layer_norm(x, layer.weight.shape, None, None, self.eps)
        y = F.layer_norm(x, layer.weight.shape, layer.weight, layer.bias, self.eps)
        return State(state.stream, y), {self.site.name: Seen(z, y)}


@dataclass(frozen=True)
class Linear(Step):
    """Linear maps of one input, their outputs side by side; or one that adds to the stream, scaled or not."""

    sites: tuple[Site, ...]
    scale: str | None = None

    def run(self, weights: Weights, state: State) -> tuple[State, dict[str, Seen]]:
        outputs = [F.linear(state.x, *site.read(weights)) for site in self.sites]
        seen = {site.name: Seen(state.x, y) for site, y in zip(self.sites, outputs)}
        if not self.sites[0].stream:
            return State(state.stream, outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)), seen
        scale = weights[self.scale] if self.scale else None
        (name, written), *_ = seen.items()
        written = Seen(written.x, written.y, state.stream, scale)
        return State(written.after), {name: written}


@dataclass(frozen=True)
class Attention(Step):
    """Softmax attention of queries, keys and values side by side: [B, N, 3d] → [B, N, d]."""

    heads: int

    def run(self, weights: Weights, state: State) -> tuple[State, dict[str, Seen]]:
        parts = state.x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*parts)
        return State(state.stream, out.transpose(1, 2).flatten(2)), {}


@dataclass(frozen=True)
class Activation(Step):
    """A module without parameters."""

    module: nn.Module

    def run(self, weights: Weights, state: State) -> tuple[State, dict[str, Seen]]:
        return State(state.stream, self.module(state.x)), {}


@dataclass(frozen=True)
class Pool(Step):
    """The stream becomes what the features are read from: its class token, or the mean of its patch tokens."""

    prefix: int
    mean: bool = False

    def run(self, weights: Weights, state: State) -> tuple[State, dict[str, Seen]]:
        pooled = state.stream[:, self.prefix :].mean(1) if self.mean else state.stream[:, 0]
        return State(pooled, pooled), {}


@dataclass(frozen=True)
class Taken(Step):
    """What is beside the stream becomes the stream."""

    def run(self, weights: Weights, state: State) -> tuple[State, dict[str, Seen]]:
        return State(state.x), {}


class Chain(Block):
    """Steps on a residual stream; its state is the stream [B, N, d].

    Args:
        steps: in order.
        others: names of parameters that no site has, such as scales.
    """

    def __init__(self, steps: Sequence[Step], others: Sequence[str] = ()) -> None:
        self.steps = tuple(steps)
        self.sites = tuple(step.sites for step in self.steps if step.sites)
        names = [name for group in self.sites for site in group for name in (*site.weights, *site.biases)]
        self.parameters = tuple(dict.fromkeys([*names, *others]))

    def observe(self, weights: Weights, state: Tensor, wanted: Collection[str]) -> dict[str, Seen]:
        missing, record, at = set(wanted), {}, State(state)
        for step in self.steps:
            if not missing:
                break
            at, seen = step.run(weights, at)
            record |= {name: value for name, value in seen.items() if name in missing}
            missing -= seen.keys()
        return record

    def advance(self, weights: Weights, state: Tensor) -> Tensor:
        at = State(state)
        for step in self.steps:
            at, _ = step.run(weights, at)
        return at.stream


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
        kinds = {site.name: site for (site,) in self.sites if site.name in wanted}
        record: dict[str, Seen] = {}

        def look(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            record[name] = Seen(_input(kinds[name], module, inputs[0]), output)
            if len(record) == len(kinds):
                raise _Reached

        with _hooks(self.module, kinds, look):
            self._forward(weights, state)
        return record

    def advance(self, weights: Weights, state: Tensor) -> Tensor:
        inputs: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else next(iter(kwargs.values())))
            raise _Reached

        handle = self.module.get_submodule(self.until).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            self._forward(weights, state)
        finally:
            handle.remove()
        return inputs[0]

    def _forward(self, weights: Weights, images: Tensor) -> None:
        try:
            torch.func.functional_call(self.module, dict(weights), (images,))
        except _Reached:
            return


def _input(site: Site, module: nn.Module, x: Tensor) -> Tensor:
    if site.kind != "norm":
        return x
    return F.layer_norm(x, module.normalized_shape, None, None, module.eps)


@contextmanager
def _hooks(module: nn.Module, names: Collection[str], look: Any) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda owner, inputs, output: look(name, owner, inputs, output)

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
