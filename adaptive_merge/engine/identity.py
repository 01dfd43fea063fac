"""What a checkpoint belongs to: the method and the data of its run, as plain values under names that users know.

A run that goes on from a checkpoint has to be the run that wrote it. What may differ is how long it takes and where
it runs: trainer settings, processes, loader workers, evaluation batches, caches, the placement of the bank; and what
people call it, the label of its recipe.

Adapter files, cards and `results.json` describe a method in the same words.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from functools import cached_property
from numbers import Integral, Real
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from adaptive_merge.adapters.heads import Head
from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.old_files import upgraded
from adaptive_merge.errors import InputError
from adaptive_merge.merge import state_dicts
from adaptive_merge.privacy import scrub
from adaptive_merge.transforms.base import Transform

__all__ = [
    *("Identity", "check", "check_numbers", "describe", "difference", "digest", "kind"),
    *("of_data", "of_heads", "of_method", "of_model", "of_part", "of_parts", "recorded", "settings"),
]

Identity = dict[str, Any]
"""Name → a string, a number, a bool, None, or a list of these."""

_KEY: Final = "adaptive_merge"
_VECTORS: Final = "task vectors"
_EXPERTS: Final = "experts"
_DEPTH: Final = 3  # of settings in settings; an object may hold itself
_SHOWN: Final = 120  # characters of a value in a message
# What torch and binding to a bank add to a part's own attributes.
_BOUND: Final = frozenset(("training", "tasks", "groups", "group_of", "free"))
# How a model learned, and not what it computes with what it learned. Groups are compared name by name.
_LEARNING: Final = re.compile(r"objective|stage|learning rate|betas|weight|coefficients: (init|trainable|groups)\b")


def of_parts(module: Any, transforms: Sequence[Any]) -> Identity:
    """Objective, stages, transforms, coefficients, adapters and heads of a module that has learned nothing yet.

    Asked once, when the module is made: later a part that does not keep its arguments apart may hold other values.

    Args:
        module: an `AdaptiveMerge`.
        transforms: that its task vectors went through.
    """
    stages = list(module.stages)
    parts = of_part("objective", stages[0].objective) if len(stages) == 1 else {"stages": len(stages)}
    for number, stage in enumerate(stages if len(stages) > 1 else (), 1):
        parts |= {f"stage {number}: learns": stage.learn, f"stage {number}: steps": stage.steps}
        parts |= of_part(f"stage {number}: objective", stage.objective)
    parts |= _numbered("transform", transforms) | of_part("coefficients", module.coefficients)
    return parts | _numbered("adapter", module.model.adapters) | of_heads(module.model.heads)


def of_heads(heads: Mapping[str, Head]) -> Identity:
    """Frozen heads, by the digest of their values; all but a plain cosine weight by kind and settings as well."""
    entries: Identity = {}
    for task, head in heads.items():
        name, bare = f"head of task {task!r}", head.bare()
        if isinstance(bare, Tensor):
            entries[name] = digest(bare)
        else:
            entries |= of_part(name, head) | {f"{name}: {key}": digest(v) for key, v in head.state_dict().items()}
    return entries


def of_method(module: Any, parts: Identity) -> Identity:
    """The module's method: its parts, its optimiser and its experts.

    Args:
        module: an `AdaptiveMerge`, as it is now.
        parts: `of_parts`, from when the module was made.
    """
    return {
        "tasks": list(module.tasks),
        **parts,
        "learning rate": float(module.lr),
        "learning rate of the adapters": float(module.adapter_lr),
        "betas": [float(beta) for beta in module.betas],
        "weight decay": float(module.weight_decay),
        _EXPERTS: hashlib.sha256(repr(module.merged_fingerprints).encode()).hexdigest(),
        _VECTORS: module.vectors_fingerprint,
        **({"blocks": module.blocks} if module.blocks else {}),
    }


def recorded(method: Identity, transforms: Sequence[Any]) -> Identity:
    """Of a method, what a file keeps.

    The bits of what a transform makes differ between machines and numbers of threads, where it decomposes matrices;
    its settings and the experts say as much. Of a function nothing else is known.
    """
    exact = all(isinstance(transform, Transform) for transform in transforms) and bool(transforms)
    return {name: value for name, value in method.items() if name != _VECTORS or not exact}


def of_model(method: Identity) -> Identity:
    """Of a method, what decides what a model computes with the values that were learned: not how it learned them."""
    return {name: value for name, value in method.items() if not _LEARNING.match(name)}


def of_data(data: Any) -> Identity:
    """What a `TaskStream` draws, in which order; of any other source of batches only its class.

    Args:
        data: the trainer's data module; None for loaders without one.
    """
    if not isinstance(data, TaskStream):
        return {"data": "loaders without a data module" if data is None else kind(data)}
    return {
        "data": kind(data),
        "tasks of the stream": list(data.images),
        "images per task": int(data.images_per_task),
        "sampling": data.sampling,
        "schedule": data.schedule,
        "seed of the stream": int(data.seed),
        **({} if data.probe_images is None else {"probe images": int(data.probe_images)}),
        **of_part("protocol", getattr(data, "protocol", None)),
        **of_part("corruption", getattr(data, "corruption", None)),
        **{f"images of task {task!r}": images.fingerprint for task, images in data.images.items()},
    }


def of_part(name: str, part: Any, depth: int = _DEPTH) -> Identity:
    """A part as its kind and its settings: `name` and `name: setting` → plain value.

    Numbers, strings, bools, None and sequences of these stand for themselves, tensors for their digest, functions
    for their name, mappings and objects for their own settings, and whatever has no attributes, such as a `Path`,
    for how it is written. Secrets are hidden; what cannot be told from another by these does not count.
    """
    if part is None:
        return {}
    entries: Identity = {name: kind(part)}
    for setting, value in settings(part).items():
        entries |= _of_setting(f"{name}: {setting}", value, depth)
    return entries


def check_numbers(parts: Identity) -> None:
    """Refuse settings that are NaN or infinite: nothing that is computed with them means anything.

    Raises:
        InputError: names part, setting and value.
    """
    for name, value in parts.items():
        for number in value if isinstance(value, list) else [value]:
            if number == "nan" or (isinstance(number, float) and not math.isfinite(number)):
                raise InputError(f"{name}: {number} is no number that anything can be computed with; give a finite one")


def kind(part: Any) -> str:
    """The name of a part's class, or of a function: short for this package's own, with its module for a user's."""
    named = part if hasattr(part, "__qualname__") else type(part)
    package = str(named.__module__).partition(".")[0]
    return named.__qualname__ if package == _KEY else f"{named.__module__}.{named.__qualname__}"


def settings(part: Any) -> dict[str, Any]:
    """What tells a part from others of its class: the arguments of its constructor, by name.

    Each is read from the attribute of its name. A class that keeps an argument elsewhere, or whose arguments do not
    say all, has a property or method `settings` that gives these by name; they go before the attributes. Of a part
    that still leaves an argument open, all public attributes count, as they are when a module is made of it.
    """
    arguments = _arguments(type(part))
    values = {name: getattr(part, name) for name in arguments if _holds(part, name)} | dict(_declared(part))
    if set(arguments) <= values.keys():
        return values
    return {name: value for name, value in getattr(part, "__dict__", {}).items() if _is_public(part, name)} | values


def describe(method: Identity, name: str) -> str:
    """A part in a few words, such as "FeatureSurgery (rank 16)"; `name` as in the method: "adapter 1"."""
    start = f"{name}: "
    words = [f"{key.removeprefix(start)} {value}" for key, value in method.items() if key.startswith(start)]
    words = [text for text in words if "sha256" not in text]
    return f"{method[name]} ({', '.join(words)})" if words else method[name]


def check(checkpoint: Mapping[str, Any], method: Identity, data: Identity | None = None) -> None:
    """Refuse a checkpoint of another method or, where `data` is given, of other data.

    Raises:
        InputError: names the first setting that differs, what the checkpoint has and what this run has.
    """
    stored = checkpoint.get(_KEY)
    if not isinstance(stored, dict) or not all(isinstance(stored.get(part), dict) for part in ("method", "data")):
        raise InputError(
            "the checkpoint does not say which method and data it belongs to, so nothing can go on from it; start the "
            "run anew (--run.if_exists overwrite)"
        )
    old = "recipe" in stored["method"]
    for part, current in (("method", method), ("data", data)):
        if current is None:
            continue
        if differs := difference(upgraded(stored[part], current) if old else stored[part], current):
            raise InputError(
                "the checkpoint was written with another {}: {}, this run has {}; resume with the settings that it was "
                "written with (the run's config.yaml), or start a new run".format(*differs)
            )


def difference(recorded: Mapping[Any, Any], current: Identity) -> tuple[str, str, str] | None:
    """The first name that two identities differ in, and both values as a message shows them; None if they agree."""
    # A transform changes the task vectors too, and its own settings say more.
    for name in sorted(dict.fromkeys((*current, *recorded)), key=lambda name: name == _VECTORS):
        if name == _VECTORS and name not in recorded:
            continue
        if _plain(recorded.get(name)) != _plain(current.get(name)):
            return str(name)[:_SHOWN], _shown(recorded, name), _shown(current, name)
    return None


def _numbered(name: str, parts: Iterable[Any]) -> Identity:
    entries: Identity = {}
    for number, part in enumerate(parts, 1):
        entries |= of_part(f"{name} {number}", part)
    return entries


def _arguments(part: type) -> list[str]:
    """Names of what the constructor takes; where it hands arguments on, those of the next class's as well."""
    names: list[str] = []
    for base in (base for base in part.__mro__ if "__init__" in vars(base)):
        if base in (object, nn.Module):
            break
        _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        named = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
        names += named
        if len(named) == len(parameters):
            break
    return list(dict.fromkeys(names))


def _holds(part: Any, name: str) -> bool:
    """Whether the part has an attribute that may be its argument: of the instance, and nothing that learns."""
    if not hasattr(part, name) or isinstance(getattr(part, name), nn.Parameter):
        return False
    on_class = inspect.getattr_static(type(part), name, None)
    return on_class is None or name in getattr(part, "__dict__", {}) or inspect.isdatadescriptor(on_class)


def _is_public(part: Any, name: str) -> bool:
    derived = isinstance(inspect.getattr_static(type(part), name, None), cached_property)
    return not (derived or name.startswith("_") or (isinstance(part, nn.Module) and name in _BOUND))


def _declared(part: Any) -> Mapping[str, Any]:
    on_class = inspect.getattr_static(type(part), "settings", None)
    if on_class is None:
        return {}
    declared = part.settings if inspect.isdatadescriptor(on_class) else part.settings()
    if not isinstance(declared, Mapping):
        raise InputError(f"`settings` of {kind(part)} has to give a mapping of names to values, got {declared!r}")
    return declared


def _of_setting(name: str, value: Any, depth: int) -> Identity:
    plain = _plain(sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value)
    if plain:
        return {name: scrub(plain[0], name.rpartition(": ")[2])}
    if isinstance(value, Tensor):
        return {name: digest(value)}
    if hasattr(value, "__qualname__"):  # functions and classes
        return {name: kind(value)}
    if isinstance(value, np.ndarray):
        return {name: digest(torch.from_numpy(value))}
    if isinstance(value, Mapping) and depth:
        parts = [_of_setting(f"{name}: {key}", part, depth - 1) for key, part in value.items()]
    elif isinstance(value, (list, tuple)) and depth:
        parts = [_of_setting(f"{name} {number}", part, depth - 1) for number, part in enumerate(value, 1)]
    elif isinstance(value, Enum) or not hasattr(value, "__dict__"):
        parts = [] if " at 0x" in repr(value) else [{name: scrub(repr(value), name.rpartition(": ")[2])}]
    else:
        parts = [of_part(name, value, depth - 1)] if depth else []
    return {key: entry for part in parts for key, entry in part.items()}


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


def _shown(entries: Mapping[Any, Any], name: Any) -> str:
    plain = _plain(entries.get(name))
    text = repr(plain[0]) if name in entries and plain else "nothing readable" if name in entries else "nothing"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def digest(tensor: Tensor) -> str:
    """sha256 of type, shape and values."""
    return state_dicts.digest(tensor, f"{tensor.dtype} {tuple(tensor.shape)}".encode())
