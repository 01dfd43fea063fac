"""What a run has learned, without the experts that it was learned on: one sealed file of kilobytes to megabytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from adaptive_merge.coefficients.linear import Coefficients
from adaptive_merge.engine import identity
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.engine.old_files import upgraded_adapters
from adaptive_merge.errors import InputError
from adaptive_merge.sealed import load_sealed, save_sealed
from adaptive_merge.weights.reader import check_finite

__all__ = ["load_adapters", "save_adapters"]

FORMAT: Final = "adaptive_merge.adapters"
VERSION: Final = 2  # 1 knew adapters by rank, layer and depth, and coefficients by bounds and granularity
_ROW: Final = "coefficients."  # of a task, of linear coefficients
_RULE: Final = "rule."  # whatever else a rule keeps
_ADAPTERS: Final = "adapters."


def save_adapters(module: AdaptiveMerge, path: str | Path) -> None:
    """Write what the merge and the adapters of a module have learned, atomically and sealed.

    Linear coefficients are kept by task and group name, another rule as its `state_dict`. The manifest in the header
    says which model they belong to: its parts and their settings, and the sha256 of the pre-trained weights, of every
    expert and of every head, so that `load_adapters` can refuse another.

    Args:
        module: an adapted module.
        path: of the `.safetensors` file to write.
    """
    rule, tensors = module.coefficients.state_dict(), {}
    if isinstance(module.coefficients, Coefficients):
        # A copy of each row: safetensors refuses tensors that share a storage.
        tensors = {_ROW + task: row.clone() for task, row in zip(module.tasks, rule.pop("values"))}
    tensors |= {_RULE + name: value for name, value in rule.items()}
    tensors |= {_ADAPTERS + name: value for name, value in module.model.adapters.state_dict().items()}
    header = {"format": FORMAT, "version": VERSION, "recipe": module.recipe, "groups": list(module.coefficients.groups)}
    save_sealed(path, tensors, {FORMAT: json.dumps(header | {"method": _method(module, module.recorded_method)})})


@torch.no_grad()
def load_adapters(module: AdaptiveMerge, path: str | Path) -> None:
    """Put what `save_adapters` wrote into a module that was built of the same parts over the same experts.

    Raises:
        MissingFileError: no such file.
        InputError: changed since it was written, not such a file, or of other experts, heads, groups, rules or
            adapters, or of other settings of these; the module is then as it was.
    """
    tensors, metadata = load_sealed(path)
    try:
        groups = _checked_groups(_read_manifest(metadata, path), module, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"`{path}`: its manifest cannot be read ({error!r}); write the file again") from error
    rule, adapters = module.coefficients.state_dict(), module.model.adapters.state_dict()
    rows = {}
    if isinstance(module.coefficients, Coefficients):
        del rule["values"]
        order = [groups.index(group) for group in module.coefficients.groups]
        values = [_tensor(tensors, _ROW + task, (len(groups),), path)[order] for task in module.tasks]
        rows = {"values": torch.stack(values)}
    states = [
        {name: _tensor(tensors, prefix + name, tuple(value.shape), path) for name, value in state.items()}
        for prefix, state in ((_RULE, rule), (_ADAPTERS, adapters))
    ]
    module.coefficients.load_state_dict(states[0] | rows)
    module.model.adapters.load_state_dict(states[1])


def _method(module: AdaptiveMerge, method: identity.Identity) -> identity.Identity:
    """What the learned values belong to, the most telling first."""
    pretrained, *experts = module.merged_fingerprints.values()
    named = {f"expert {task!r}": fingerprint for task, fingerprint in zip(module.tasks, experts)}
    first = {"tasks": list(module.tasks), "pre-trained model": pretrained, **named}
    return first | identity.of_model(method) | identity.of_heads(module.model.heads)


def _read_manifest(metadata: dict[str, str], path: str | Path) -> dict[str, Any]:
    if FORMAT not in metadata:
        raise InputError(f"`{path}`: sealed by this program, but not a file of adapters; expected one of save_adapters")
    manifest = json.loads(metadata[FORMAT])
    if manifest.get("version") not in (1, VERSION):
        raise InputError(
            f"`{path}`: expected version {VERSION} of the adapter file, found {manifest.get('version')!r}; read it "
            "with the version of the program that wrote it"
        )
    return manifest


def _checked_groups(manifest: dict[str, Any], module: AdaptiveMerge, path: str | Path) -> list[str]:
    """The file's groups in its order, after refusing another model."""
    current, groups = _method(module, module.method), module.coefficients.groups
    if manifest["version"] == 1:
        recorded = upgraded_adapters(manifest, current, module.model.heads)
    else:
        recorded = manifest["method"]
    # Linear coefficients are kept by name: their groups may stand in another order.
    grouped = [{"groups": sorted(names)} for names in (manifest["groups"], groups)]
    if differs := identity.difference({**recorded, **grouped[0]}, current | grouped[1]):
        raise InputError(
            "`{}`: learned with another {}: {}, this module has {}; build the module with the configuration and over "
            "the checkpoints that the file was learned with".format(path, *differs)
        )
    return manifest["groups"]


def _tensor(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], path: str | Path) -> Tensor:
    if name not in tensors or tuple(tensors[name].shape) != shape:
        found = tuple(tensors[name].shape) if name in tensors else "none"
        raise InputError(f"`{path}`: tensor `{name}`: expected shape {shape}, found {found}; write the file again")
    check_finite({name: tensors[name]}, str(path))
    return tensors[name]
