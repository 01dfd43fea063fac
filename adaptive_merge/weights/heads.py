"""Published classification heads (`head_*.pt`): the linear layer on top of normalised features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from adaptive_merge.errors import InputError, MissingFileError
from adaptive_merge.weights.files import open_entries
from adaptive_merge.weights.modules import named_records
from adaptive_merge.weights.pickles import Stub
from adaptive_merge.weights.reader import check_finite
from adaptive_merge.weights.torch_files import open_torch_file

__all__ = ["read_head"]


def read_head(path: str | Path) -> Tensor:
    """The weight [C, d] (float32) of a head, to be applied to L2-normalised features; nothing in the file is run.

    Args:
        path: a whole pickled `ClassificationHead` or `Linear`, or a state dict or safetensors file with `weight`.

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
    tensors = {weights[0]: weight}
    bias = weights[0].removesuffix("weight") + "bias"
    if bias in loaders:
        tensors[bias] = loaders[bias]().to(torch.float32)
        check_finite(tensors, str(path))
        if tensors[bias].any():
            raise InputError(
                f"`{path}`: tensor `{bias}`: expected zeros as in every zero-shot head, found values up to "
                f"{tensors[bias].abs().max():.3g}; a head that was trained with its bias is read as a tint instead"
            )
    check_finite(tensors, str(path))
    _check_normalises(path)
    return weight.contiguous()


def _check_normalises(path: Path) -> None:
    if path.suffix == ".safetensors":
        return
    file = open_torch_file(path)
    if isinstance(file.root, Stub) and named_records(file) and file.root.state.get("normalize") is False:
        raise InputError(
            f"`{path}`: this head does not normalise its input (`normalize` is False), expected True; build the head "
            "from class names instead"
        )
