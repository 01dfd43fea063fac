"""What the state dicts of a pre-trained model and its experts have to be, and what becomes of their buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from adaptive_merge import upstream
from adaptive_merge.errors import InputError, did_you_mean

__all__ = ["check_expert", "check_finite", "check_models", "differs", "digest", "mean", "raw", "shared"]

# Counters that only training reads: they say nothing about a model and keep no models apart.
_COUNTERS = ("num_batches_tracked", "n_averaged", "num_updates")


def differs(values: Sequence[Tensor]) -> bool:
    """Whether a floating-point buffer is not the same in all models."""
    return values[0].is_floating_point() and not all(torch.equal(values[0], value) for value in values)


def mean(values: Tensor) -> Tensor:
    """Of everyone's values [1 + T, …] what a merge has: the first expert's where all agree, else their mean."""
    experts = values[1:]
    return experts[0].clone() if bool((experts == experts[0]).all()) else experts.mean(0)


def shared(name: str, values: Sequence[Tensor], experts: Iterable[str]) -> Tensor:
    """A buffer that all experts have alike, or a counter."""
    if name.rpartition(".")[2] in _COUNTERS and not values[0].is_floating_point():
        return torch.stack(tuple(values[1:])).amax(0)
    for task, value in zip(experts, values[1:]):
        if not torch.equal(values[1], value):
            raise InputError(
                f"expert {task!r}: the integer buffer {name!r} differs from the other experts'; it cannot be merged: "
                "set it to one value in all of them"
            )
    return values[1].clone()


def check_finite(owner: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinity; tensors without numbers have none."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        # A sum is finite unless a number is not, or it overflows, which the exact look then clears.
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            raise InputError(f"{owner}: tensor {name!r} holds NaN or infinite values; the checkpoint is damaged")


def check_models(pretrained: object, experts: object) -> None:
    """State dicts, and not whatever holds them."""
    if not isinstance(pretrained, Mapping) or not isinstance(experts, Mapping):
        odd = experts if isinstance(pretrained, Mapping) else pretrained
        raise InputError(
            f"expected the pre-trained state dict and task → state dict of its expert, got a {type(odd).__name__}; "
            "give `model.state_dict()`, and `{'task': expert.state_dict()}`"
        )
    for name, tensor in pretrained.items():
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"pre-trained weights: {name!r} is {kind}; a state dict holds real tensors by name")


def check_expert(
    task: str, expert: Mapping[str, Tensor], pretrained: Mapping[str, Tensor], buffers: Collection[str]
) -> None:
    owner = f"expert {task!r}"
    if not isinstance(expert, Mapping):
        raise InputError(f"{owner} is a {type(expert).__name__}; give its state dict, name → tensor")
    for missing in (name for name in pretrained if name not in expert and name.rpartition(".")[2] not in _COUNTERS):
        raise InputError(
            f"{owner}: tensor {missing!r} is missing{did_you_mean(missing, expert)}; "
            "was it fine-tuned from this pre-trained model?"
        )
    for extra in (name for name in expert if name not in pretrained and name.rpartition(".")[2] not in _COUNTERS):
        raise InputError(
            f"{owner}: tensor {extra!r} is not in the pre-trained model; remove it, or give the "
            "pre-trained model that this expert comes from"
        )
    for name, tensor in ((name, expert[name]) for name in pretrained if name in expert):
        expected = pretrained[name]
        if not isinstance(tensor, Tensor) or tensor.is_floating_point() != expected.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(
                f"{owner}: {name!r} is {kind}, the pre-trained model has {expected.dtype}; undo the quantisation or "
                "the cast, or save the model's state dict again"
            )
        if tensor.shape != expected.shape:
            shapes = tuple(tensor.shape), tuple(expected.shape)
            transposed = "; it looks transposed" if shapes[0] == shapes[1][::-1] else ""
            raise InputError(
                f"{owner}: tensor {name!r} has shape {shapes[0]}, the pre-trained model has {shapes[1]}{transposed}"
            )
    # What buffers hold may be infinite, as attention masks are; what differs between experts may not.
    check_finite(
        owner,
        {
            name: expert[name]
            for name, value in pretrained.items()
            if value.is_floating_point() and (name not in buffers or differs([value, expert[name]]))
        },
    )


def digest(tensor: Tensor, header: bytes = b"") -> str:
    """sha256 of a header and a tensor's bytes."""
    result = hashlib.sha256(header)
    result.update(raw(tensor))
    return result.hexdigest()


def raw(tensor: Tensor) -> bytes | memoryview:
    """A tensor's bytes; of one without numbers its shape, so that it has a digest too."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return str(tuple(tensor.shape)).encode() if upstream.is_hollow(flat) else flat.numpy().data
