"""What routes share: an image's own weights of the experts, the places where they act, and which task they point to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_merge.adapters.base import Adapter
from adaptive_merge.adapters.heads import Head
from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["Layer", "Route", "as_tokens", "layers_of"]


class Route(Adapter):
    """An adapter that mixes experts image by image, without knowing the task.

    A gate is a function of its own image alone. Averaged over a batch, as `batch_reduce` in public code does even when
    it scores, it would tell the task wherever a batch holds one task's images; here a prediction never depends on what
    else is in the batch.

    What is frozen, such as factors of task vectors, lies in `frozen`: it moves with the model, no `state_dict` holds
    it, and every process makes it anew from the bank.
    """

    needs_task = False

    def __init__(self) -> None:
        super().__init__()
        self.frozen: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []
        """Gates [B, T] of the forward that ran last, one for each place that has a gate."""

    def create(self, backbone: MergedBackbone, heads: Mapping[str, Head]) -> None:
        self.place(backbone)
        self.frozen = self.freeze(backbone)

    def place(self, backbone: MergedBackbone) -> None:
        """Choose the layers and create what learns; of the backbone only the structure is looked at."""

    def freeze(self, backbone: MergedBackbone) -> dict[str, Tensor]:
        """What is made of the bank once; default: nothing."""
        return {}

    def tensors(self, bank: TaskVectors) -> dict[str, Tensor]:
        """All that it needs of the experts, so that with these in `frozen` it works without a bank."""
        return self.frozen

    def scores(self) -> Tensor:
        """[B, T] of the forward that ran last; the largest is the task of an image. Default: the mean of the gates."""
        return torch.stack(self.seen).mean(0)

    def fold(self, task: str, weights: Mapping[str, Tensor], head: Head) -> tuple[Mapping[str, Tensor], Head]:
        """There is none: the weights are an image's."""
        raise InputError(f"{type(self).__name__} mixes weights image by image, which no plain tower does")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Route:
        super()._apply(fn, recurse)
        device = fn(torch.empty(0)).device
        self.frozen = {name: value.to(device) for name, value in self.frozen.items()}
        return self


@dataclass(frozen=True)
class Layer:
    """A matrix of a block that acts on tokens.

    Args:
        block: name of the block, such as `transformer.resblocks.0`.
        site: the submodule whose output it changes: a linear layer, or the attention that it is a part of.
        weight: name of the matrix [out, in].
        bias: name of its bias [out]; None: it has none.
        attention: the heads of its attention; 0: it is a linear layer.
    """

    block: str
    site: str
    weight: str
    bias: str | None
    attention: int = 0


def layers_of(backbone: MergedBackbone, attention: bool) -> list[Layer]:
    """The linear layers in the tower's blocks, in order, and with `attention` the two matrices of each attention.

    Args:
        backbone: of numbered blocks.
        attention: whether to take `nn.MultiheadAttention`, and linear layers with "attn" in their names.

    Raises:
        InputError: there are none; an attention that is not the plain one over a batch's tokens.
    """
    layers: list[Layer] = []
    inside: tuple[str, ...] = ()
    for name, module in backbone.skeleton.named_modules():
        block = next((one for one in backbone.blocks if name.startswith(f"{one}.")), None)
        if block is None or name.startswith(inside or "\0"):
            continue
        if isinstance(module, nn.MultiheadAttention):
            inside += (f"{name}.",)
            layers += _attention_layers(block, name, module) if attention else []
        elif isinstance(module, nn.Linear) and (attention or "attn" not in name):
            bias = None if module.bias is None else f"{name}.bias"
            layers.append(Layer(block, name, f"{name}.weight", bias))
    if not layers:
        raise InputError("a route needs a backbone of numbered blocks with linear layers; this one has none")
    return layers


def _attention_layers(block: str, name: str, module: nn.MultiheadAttention) -> list[Layer]:
    if not (module.batch_first and module.in_proj_weight is not None and module.bias_k is None):
        raise InputError(f"the attention {name!r} is not a plain one over [batch, tokens, width]; routes cannot mix it")
    biased = module.in_proj_bias is not None
    names = (("in_proj_weight", "in_proj_bias"), ("out_proj.weight", "out_proj.bias"))
    return [
        Layer(block, name, f"{name}.{weight}", f"{name}.{bias}" if biased else None, module.num_heads)
        for weight, bias in names
    ]


def as_tokens(tensor: Tensor) -> Tensor:
    """[B, N, d]: tokens as they are, a row [B, d] as one token."""
    return tensor if tensor.dim() == 3 else tensor[:, None]


def mean_token(tensor: Any) -> Tensor:
    """[B, d] in float32."""
    return as_tokens(tensor).float().mean(1)
