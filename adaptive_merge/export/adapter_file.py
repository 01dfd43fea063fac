"""What a run has learned, without the experts that it was learned on: one sealed file of kilobytes to megabytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.errors import InputError
from adaptive_merge.sealed import load_sealed, save_sealed
from adaptive_merge.weights.reader import check_finite

__all__ = ["load_adapters", "save_adapters"]

FORMAT: Final = "adaptive_merge.adapters"
VERSION: Final = 1
_COEFFICIENTS: Final = "coefficients."
_ADAPTERS: Final = "adapters."


def save_adapters(module: AdaptiveMerge, path: str | Path) -> None:
    """Write coefficients (by task and group name), surgery adapters and tints of a module, atomically and sealed.

    The manifest in the header names recipe, tasks, groups and adapters, and carries the sha256 of the pre-trained
    weights, of every expert and of every head, so that `load_adapters` can refuse what they do not belong to.

    Args:
        module: an adapted module.
        path: of the `.safetensors` file to write.
    """
    values = module.coefficients.values.detach()
    # A copy of each row: safetensors refuses tensors that share a storage.
    tensors = {_COEFFICIENTS + task: row.clone() for task, row in zip(module.tasks, values)}
    tensors |= {_ADAPTERS + name: value for name, value in module.model.adapters.state_dict().items()}
    save_sealed(path, tensors, {FORMAT: json.dumps(_manifest(module))})


@torch.no_grad()
def load_adapters(module: AdaptiveMerge, path: str | Path) -> None:
    """Put what `save_adapters` wrote into a module that was built with the same recipe over the same experts.

    Raises:
        MissingFileError: no such file.
        InputError: changed since it was written, not such a file, or of other experts, heads, groups or adapters;
            the module is then as it was.
    """
    tensors, metadata = load_sealed(path)
    try:
        groups = _checked_groups(_read_manifest(metadata, path), _manifest(module), path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"`{path}`: its manifest cannot be read ({error!r}); write the file again") from error
    order = [groups.index(group) for group in module.coefficients.groups]
    rows = [_tensor(tensors, _COEFFICIENTS + task, (len(groups),), path)[order] for task in module.tasks]
    state = {
        name: _tensor(tensors, _ADAPTERS + name, tuple(value.shape), path)
        for name, value in module.model.adapters.state_dict().items()
    }
    module.coefficients.values.copy_(torch.stack(rows))
    module.model.adapters.load_state_dict(state)


def _manifest(module: AdaptiveMerge) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "recipe": module.recipe,
        "tasks": list(module.tasks),
        "granularity": module.coefficients.granularity,
        "bounds": module.coefficients.bounds,
        "groups": list(module.coefficients.groups),
        "adapters": [_describe(adapter) for adapter in module.model.adapters],
        "experts": module.merged_fingerprints,
        "task vectors": module.model.backbone.task_vectors.fingerprint,
        "heads": {
            task: " ".join(map(_digest, head.state_dict().values())) for task, head in module.model.heads.items()
        },
    }


def _describe(adapter: torch.nn.Module) -> dict[str, Any]:
    """Kind and settings: what the constructor took, as far as it is a plain value."""
    settings = {key: value for key, value in vars(adapter).items() if key in ("rank", "layer", "depth")}
    return {"kind": type(adapter).__name__, **settings}


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().float()
    return hashlib.sha256(str(tuple(flat.shape)).encode() + flat.numpy().tobytes()).hexdigest()


def _read_manifest(metadata: dict[str, str], path: str | Path) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise InputError(f"`{path}`: sealed by this program, but not a file of adapters; expected one of save_adapters")
    found = json.loads(metadata[FORMAT])
    if found.get("version") != VERSION:
        raise InputError(
            f"`{path}`: expected version {VERSION} of the adapter file, found {found.get('version')!r}; read it with "
            "the version of the program that wrote it"
        )
    return found


def _checked_groups(found: dict[str, Any], wanted: dict[str, Any], path: str | Path) -> list[str]:
    """The file's groups in its order, after refusing another recipe or other experts, most telling difference first."""
    _same(found["tasks"], wanted["tasks"], "tasks", path)
    for what in ("experts", "heads"):
        for name, digest in wanted[what].items():
            if found[what].get(name) != digest:
                owner = f"expert {name!r}" if what == "experts" else f"the head of task {name!r}"
                owner = "the pre-trained model" if name == "pretrained" else owner
                raise InputError(
                    f"`{path}`: learned with another version of {owner}: sha256 {found[what].get(name)}, this module "
                    f"has {digest}; build the module over the checkpoints that the file was learned on"
                )
    for what in ("granularity", "bounds", "adapters", "task vectors"):
        _same(found[what], wanted[what], what, path)
    _same(sorted(found["groups"]), sorted(wanted["groups"]), "groups", path)
    return found["groups"]


def _same(found: Any, wanted: Any, what: str, path: str | Path) -> None:
    if found != wanted:
        shown = [str(value) if len(str(value)) <= 200 else f"{str(value)[:200]} …" for value in (found, wanted)]
        raise InputError(
            f"`{path}`: of another recipe: {what}: expected {shown[1]} as in this module, found {shown[0]}; build the "
            "module with the configuration that the file was learned with"
        )


def _tensor(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: str | Path) -> Tensor:
    if name not in tensors or tuple(tensors[name].shape) != shape:
        found = tuple(tensors[name].shape) if name in tensors else "none"
        raise InputError(f"`{path}`: tensor `{name}`: expected shape {shape}, found {found}; write the file again")
    check_finite({name: tensors[name]}, str(path))
    return tensors[name]
