"""Named tensors of whatever a torch file held: a state dict, a wrapped state dict, or a whole pickled module."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, Final

from adaptive_merge.errors import InputError
from adaptive_merge.limits import MODULE_DEPTH, MODULES, TENSOR_NAME, TENSORS, LimitError
from adaptive_merge.weights.manifest import Manifest, triple
from adaptive_merge.weights.pickles import Stub, TensorRecord
from adaptive_merge.weights.torch_files import TorchFile

__all__ = ["facts_of_module", "named_records"]

_WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "module")
_QUICK: Final = "QuickGELU"
_PLAIN: Final = "torch.nn.modules.activation.GELU"


def named_records(file: TorchFile) -> dict[str, TensorRecord]:
    """Every tensor of the saved object by its state-dict name.

    Raises:
        InputError: the file holds no tensors under names (a bare tensor, a list, an optimiser state …).
    """
    root = file.root
    if isinstance(root, dict):
        wrapped = [root[key] for key in _WRAPPERS if isinstance(root.get(key), dict | Stub)]
        root = wrapped[0] if wrapped and not _tensors(root) else root
    records: dict[str, TensorRecord] = {}
    named = [("", _tensors(root))] if isinstance(root, dict) else []
    for prefix, own in chain(named, _own(root, str(file.path))):
        longest = max(map(len, own), default=0)
        if len(records) + len(own) > TENSORS or len(prefix) + longest > TENSOR_NAME:
            raise LimitError(
                f"`{file.path}`: refused, more than {TENSORS:,} tensors, or a name of over {TENSOR_NAME} characters"
            )
        records.update((prefix + name, record) for name, record in own.items())
    if not records:
        what = getattr(root, "origin", type(root).__name__)
        raise InputError(
            f"`{file.path}`: holds `{what}`, which has no named tensors; expected a state dict or a saved module"
        )
    return records


def _own(root: Any, path: str) -> Iterator[tuple[str, dict[str, TensorRecord]]]:
    """Prefix and tensors of each module of a saved module; nothing of anything else."""
    if isinstance(root, Stub):
        for prefix, stub in _modules(root, path):
            yield prefix, _own_tensors(stub)


def facts_of_module(file: TorchFile) -> Manifest:
    """What a whole pickled module states of its tower: the activation, the heads, the normalisation."""
    if not isinstance(file.root, Stub):
        return Manifest(str(file.path))
    activations: set[bool] = set()
    heads = None
    for prefix, stub in _modules(file.root, str(file.path)):
        if "visual." not in prefix:
            continue
        if stub.origin.endswith(_QUICK) or stub.origin == _PLAIN:
            activations.add(stub.origin.endswith(_QUICK))
        count = stub.state.get("num_heads")
        if prefix.endswith("resblocks.0.attn.") and isinstance(count, int) and 0 < count <= TENSORS:
            heads = count
    quick_gelu = activations.pop() if len(activations) == 1 else None
    mean, std = _normalisation(file.root)
    return Manifest(str(file.path), heads=heads, quick_gelu=quick_gelu, mean=mean, std=std)


def _tensors(items: dict[Any, Any]) -> dict[str, TensorRecord]:
    return {key: value for key, value in items.items() if isinstance(key, str) and isinstance(value, TensorRecord)}


def _own_tensors(stub: Stub) -> dict[str, TensorRecord]:
    """Parameters, then buffers; of a TorchScript object, its tensor attributes."""
    if "_parameters" not in stub.state:
        return _tensors(stub.state)
    groups = [stub.state.get(key) for key in ("_parameters", "_buffers")]
    return {name: record for group in groups if isinstance(group, dict) for name, record in _tensors(group).items()}


def _modules(root: Stub, path: str) -> Iterator[tuple[str, Stub]]:
    """(prefix ending in a dot or empty, module) of the tree, in `named_modules()` order."""
    stack, count = [("", root, 0)], 0
    while stack:
        prefix, stub, depth = stack.pop()
        count += 1
        if depth > MODULE_DEPTH or count > MODULES or len(prefix) > TENSOR_NAME:
            raise LimitError(f"`{path}`: refused, modules nested more than {MODULE_DEPTH} deep or {MODULES} in all")
        yield prefix, stub
        children = stub.state.get("_modules") if "_parameters" in stub.state else stub.state
        named = children.items() if isinstance(children, dict) else ()
        nested = [
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in named
            if isinstance(child, Stub) and isinstance(name, str)
        ]
        stack.extend(reversed(nested))


def _normalisation(root: Stub) -> tuple[Any, Any]:
    """Mean and std of the `Normalize` in the wrapper's `val_preprocess`, where it has one."""
    preprocess = root.state.get("val_preprocess")
    steps = preprocess.state.get("transforms") if isinstance(preprocess, Stub) else None
    for step in steps if isinstance(steps, list) else []:
        if isinstance(step, Stub) and step.origin.endswith(".Normalize"):
            return triple(step.state.get("mean")), triple(step.state.get("std"))
    return None, None
