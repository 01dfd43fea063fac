"""What a checkpoint belongs to: the method and the data of its run, as plain values under names that users know.

A run that goes on from a checkpoint has to be the run that wrote it. What may differ is how long it takes and where
it runs: trainer settings, processes, loader workers, evaluation batches, caches, the placement of the bank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Final

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from adaptive_merge.data.stream import TaskStream
from adaptive_merge.errors import InputError
from adaptive_merge.privacy import scrub

__all__ = ["Identity", "check", "of_data", "of_method", "of_part", "of_parts"]

Identity = dict[str, Any]
"""Name → a string, a number, a bool, None, or a list of these."""

_KEY: Final = "adaptive_merge"
_VECTORS: Final = "task vectors"
_DEPTH: Final = 2  # parts of parts of parts are nobody's setting
_SHOWN: Final = 120  # characters of a value in a message
# What torch and binding to a bank add to a part's own settings.
_NO_SETTINGS: Final = frozenset(("training", "tasks", "groups", "group_of", "free"))


def of_parts(module: pl.LightningModule, transforms: Sequence[Any]) -> Identity:
    """Objective, stages, transforms, coefficients, adapters and heads of a module that has learned nothing yet.

    Asked once, when the module is made: later the coefficients are no longer the start values, and an objective may
    count what it has seen.
    """
    stages = list(module.stages)
    found = of_part("objective", stages[0].objective) if len(stages) == 1 else {"stages": len(stages)}
    for number, stage in enumerate(stages if len(stages) > 1 else (), 1):
        found |= {f"stage {number}: learns": stage.learn, f"stage {number}: steps": stage.steps}
        found |= of_part(f"stage {number}: objective", stage.objective)
    for number, transform in enumerate(transforms, 1):
        found |= of_part(f"transform {number}", transform)
    found |= of_part("coefficients", module.coefficients) | _start(module.coefficients)
    for number, adapter in enumerate(module.model.adapters, 1):
        found |= of_part(f"adapter {number}", adapter)
    for task, head in module.model.heads.items():
        found |= _of_head(f"head of task {task!r}", head.bare())
    return found


def _of_head(name: str, head: Tensor | nn.Module) -> Identity:
    if isinstance(head, Tensor):
        return {name: _digest(head)}
    return of_part(name, head) | {f"{name}: {key}": _digest(value) for key, value in head.state_dict().items()}


def of_method(module: pl.LightningModule, parts: Identity) -> Identity:
    """The module's method: its parts, its optimiser and its experts.

    Args:
        module: as it is now.
        parts: `of_parts`, from when the module was made.
    """
    return {
        "recipe": module.recipe,
        "tasks": list(module.tasks),
        **parts,
        "learning rate": float(module.lr),
        "learning rate of the adapters": float(module.adapter_lr),
        "betas": [float(beta) for beta in module.betas],
        "weight decay": float(module.weight_decay),
        _VECTORS: module.model.backbone.task_vectors.fingerprint,
    }


def of_data(data: Any) -> Identity:
    """What a `TaskStream` draws, in which order; of any other source of batches only its class.

    Args:
        data: the trainer's data module; None for loaders without one.
    """
    if not isinstance(data, TaskStream):
        return {"data": "loaders without a data module" if data is None else _name(data)}
    return {
        "data": _name(data),
        "tasks of the stream": list(data.images),
        "images per task": int(data.images_per_task),
        "sampling": data.sampling,
        "schedule": data.schedule,
        "seed of the stream": int(data.seed),
        **of_part("protocol", getattr(data, "protocol", None)),
        **of_part("corruption", getattr(data, "corruption", None)),
        **{f"images of task {task!r}": images.fingerprint for task, images in data.images.items()},
    }


def of_part(name: str, part: Any, depth: int = _DEPTH) -> Identity:
    """A part as its class and its public settings: `name` and `name: setting` → plain value.

    Numbers, strings, bools, None and sequences of these stand for themselves, tensors for their digest, functions
    for their name, mappings and objects for their own settings. Secrets are hidden; what else an attribute holds
    does not count.
    """
    if part is None:
        return {}
    found: Identity = {name: _name(part)}
    for setting, value in vars(part).items():
        derived = isinstance(getattr(type(part), setting, None), cached_property)
        if not (derived or setting.startswith("_") or (isinstance(part, nn.Module) and setting in _NO_SETTINGS)):
            found |= _of_setting(f"{name}: {setting}", value, depth)
    return found


def check(checkpoint: Mapping[str, Any], method: Identity, data: Identity | None = None) -> None:
    """Refuse a checkpoint of another method or, where `data` is given, of other data.

    Raises:
        InputError: names the first setting that differs, what the checkpoint has and what this run has.
    """
    found = checkpoint.get(_KEY)
    if not isinstance(found, dict) or not all(isinstance(found.get(part), dict) for part in ("method", "data")):
        raise InputError(
            "the checkpoint does not say which method and data it belongs to, so nothing can go on from it; start the "
            "run anew (--run.if_exists overwrite)"
        )
    _compare(found["method"], method)
    if data is not None:
        _compare(found["data"], data)


def _compare(found: Mapping[Any, Any], wanted: Identity) -> None:
    # A transform changes the task vectors too, and its own settings say more.
    for name in sorted(dict.fromkeys((*wanted, *found)), key=lambda name: name == _VECTORS):
        if _plain(found.get(name)) != _plain(wanted.get(name)):
            raise InputError(
                f"the checkpoint was written with another {str(name)[:_SHOWN]}: {_shown(found, name)}, this run has "
                f"{_shown(wanted, name)}; resume with the settings that it was written with (the run's config.yaml), "
                "or start a new run"
            )


def _of_setting(name: str, value: Any, depth: int) -> Identity:
    plain = _plain(value)
    if plain:
        return {name: scrub(plain[0], name.rpartition(": ")[2])}
    if isinstance(value, Tensor):
        return {name: _digest(value)}
    if hasattr(value, "__qualname__"):  # functions and classes
        return {name: f"{value.__module__}.{value.__qualname__}"}
    if not depth:
        return {}
    if isinstance(value, Mapping):
        parts = [_of_setting(f"{name}: {key}", part, depth - 1) for key, part in value.items()]
    elif isinstance(value, (list, tuple)):
        parts = [_of_setting(f"{name} {number}", part, depth - 1) for number, part in enumerate(value, 1)]
    else:
        parts = [of_part(name, value, depth - 1)] if hasattr(value, "__dict__") else []
    return {key: entry for part in parts for key, entry in part.items()}


def _start(coefficients: Any) -> Identity:
    """Where the coefficients start and what they weigh; of a file its values count, not its path."""
    init = coefficients.init
    if isinstance(init, str) and init not in ("average", "metagpt"):
        init = f"values of sha256 {coefficients.fingerprint}"
    groups = hashlib.sha256(repr((coefficients.groups, coefficients.group_of)).encode()).hexdigest()
    return {"coefficients: groups": f"{len(coefficients.groups)}, sha256 {groups}"} | _of_setting(
        "coefficients: init", init, 1
    )


def _plain(value: Any, depth: int = 4) -> tuple[Any, ...]:
    """(The value as a checkpoint keeps it,), or () where it is not plain; in a tuple, for None is plain."""
    if value is None or isinstance(value, (bool, str)):
        return (value,)
    if isinstance(value, Integral):
        return (int(value),)
    if isinstance(value, Real):
        return (float(value) if value == value else "nan",)
    if isinstance(value, (list, tuple)) and depth:
        parts = [_plain(part, depth - 1) for part in value]
        return ([part[0] for part in parts],) if all(parts) else ()
    return ()


def _name(part: Any) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _shown(entries: Mapping[Any, Any], name: Any) -> str:
    plain = _plain(entries.get(name))
    text = repr(plain[0]) if name in entries and plain else "nothing readable" if name in entries else "nothing"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{content.dtype} {tuple(content.shape)}".encode())
    digest.update(memoryview(content.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()
