"""Published classification heads (`head_*.pt`): the linear layer on top of normalised features."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.weights.files import open_entries
from adaptive_merge.weights.modules import named_records
from adaptive_merge.weights.pickles import Stub
from adaptive_merge.weights.reader import check_finite
from adaptive_merge.weights.torch_files import open_torch_file

__all__ = ["read_head"]

_LARGEST_LOGARITHM: Final = math.log(1000)


def read_head(path: str | Path) -> Tensor:
    """The weight [C, d] (float32) of a head, to be applied to L2-normalised features; nothing in the file is run.

    Under `headers_only` its shape alone: whether the bias is zero and what the scale is, the numbers would tell.

    Args:
        path: a whole pickled `ClassificationHead` or `Linear`, or a state dict or safetensors file with `weight`. A
            `logit_scale` beside it is applied, as a logarithm up to ln 1000 and else as it is, unless the rows have it.

    Raises:
        InputError: no weight, a bias that is not zero, or a head that does not normalise its input.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"`{path}`: no such file; expected a classification head (head_<Task>.pt)")
    loaders, _, _ = open_entries(path)
    weights = [name for name in loaders if name.rpartition(".")[2] == "weight"]
    if len(weights) != 1:
        raise InputError(f"`{path}`: expected one tensor `weight`, found {sorted(loaders)[:6]}; is this a head?")
    weight = loaders[weights[0]]().to(torch.float32)
    if weight.dim() != 2:
        raise InputError(f"`{path}`: tensor `{weights[0]}`: expected [classes, width], found {tuple(weight.shape)}")
    check_finite({weights[0]: weight}, str(path))
    bias = weights[0].removesuffix("weight") + "bias"
    values = loaders[bias]().to(torch.float32) if bias in loaders else torch.zeros(1)
    if not values.is_meta and values.any():
        check_finite({bias: values}, str(path))
        raise InputError(
            f"`{path}`: tensor `{bias}`: expected zeros as in every zero-shot head, found values up to "
            f"{values.abs().max():.3g}; give the zero-shot head of this task"
        )
    _check_normalises(path)
    scale = weights[0].removesuffix("weight") + "logit_scale"
    if scale in loaders and not weight.is_meta:
        weight = weight * _scale(loaders[scale]().to(torch.float32), weight, f"`{path}`: tensor `{scale}`")
    return weight.contiguous()


def _scale(stored: Tensor, weight: Tensor, name: str) -> float:
    """What the rows of a head still have to be multiplied by."""
    if stored.numel() != 1 or not bool(stored.isfinite()):
        raise InputError(f"{name}: expected one finite number, found {stored.flatten()[:4].tolist()}")
    value = float(stored)
    scale = math.exp(value) if value <= _LARGEST_LOGARITHM else value
    length = float(weight.norm(dim=-1).median())
    return 1.0 if math.isclose(length, scale, rel_tol=0.02) else scale


def _check_normalises(path: Path) -> None:
    if path.suffix == ".safetensors":
        return
    file = open_torch_file(path)
    if isinstance(file.root, Stub) and named_records(file) and file.root.state.get("normalize") is False:
        raise InputError(
            f"`{path}`: this head does not normalise its input (`normalize` is False), expected True; build the head "
            "from class names instead"
        )
