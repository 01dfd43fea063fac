"""Configurations by name, and in layers: a recipe, then the suite that it runs on, each in a file of its own.

In a recipe, `by_suite` says what differs on some suites: a part of the suite's name, such as `vit_l_14` or `20tasks` →
settings that are laid over the recipe's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from adaptive_merge.errors import InputError, MissingFileError, did_you_mean
from adaptive_merge.files import shipped
from adaptive_merge.limits import LimitError, parse_yaml, read_yaml

__all__ = ["Layer", "find_config", "layered", "read_layers", "recipe_files", "suite_name"]

_OPTIONS: Final = ("--config", "-c")
_SUITE: Final = "--suite.name"
_BY_SUITE: Final = "by_suite"


class Layer(NamedTuple):
    """One `--config`: its path, or its text where the path alone does not say it, and what it holds."""

    name: str
    settings: Any


def recipe_files() -> dict[str, Path]:
    """Name → file of every configuration that ships; those of the embedded suite come first, without a folder."""
    root = shipped()
    names = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob("*.yaml")}
    names = {name.removeprefix("embedded/"): path for name, path in names.items()}
    return {name: names[name] for name in sorted(names, key=lambda name: (name.count("/"), name))}


def find_config(name: str) -> Path:
    """The file of a configuration: the path where there is one, else the shipped one of this name.

    Raises:
        MissingFileError: neither is there.
    """
    path, known = Path(name), recipe_files()
    if path.is_file():
        return path
    if name in known:
        return known[name]
    beside = [str(other) for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    hint = did_you_mean(name, [*known, *beside]) or "; adaptive-merge recipes lists what ships"
    raise MissingFileError(f"{name}: there is no such configuration{hint}")


def read_layers(names: Sequence[str], suite: str | None = None) -> list[Layer]:
    """The configurations in their order, each with what it says about the suite that they name together.

    Args:
        names: paths, names of recipes, or settings as YAML text.
        suite: a name that overrides theirs.

    Raises:
        MissingFileError, InputError: one is not there, or not readable as YAML.
    """
    layers = [_read(name) for name in names]
    parts = Path(suite or _suite_of(layers)).parts
    return [_on_suite(layer, parts) if _get(layer.settings, _BY_SUITE) else layer for layer in layers]


def suite_name(names: Sequence[str]) -> str:
    """The suite that configurations name together; errors as of `read_layers`."""
    return _suite_of(read_layers(names)) or "embedded"


def layered(arguments: Sequence[str]) -> list[str]:
    """The arguments of `fit`, with every `--config` as a path or as YAML text that the parser reads."""
    arguments = [part for argument in arguments for part in _apart(argument)]
    places = [place for place, before in enumerate(arguments[:-1], 1) if before in _OPTIONS]
    suites = [arguments[place] for place, before in enumerate(arguments[:-1], 1) if before == _SUITE]
    layers = read_layers([arguments[place] for place in places], suites[-1] if suites else None)
    for place, layer in zip(places, layers):
        arguments[place] = layer.name
    for argument in arguments:
        if "&" in argument and "*" in argument:  # aliases, perhaps; the parser writes them out when it complains
            _inline(argument.partition("=")[2] if argument.startswith("--") else argument)
    return arguments


def _apart(argument: str) -> list[str]:
    option, equals, value = argument.partition("=")
    return [option, value] if equals and option in (*_OPTIONS, _SUITE) else [argument]


def _read(name: str) -> Layer:
    inline = _inline(name)
    if inline is not None or name == "-":  # what only the parser reads
        return Layer(name, inline)
    if "://" in name:
        raise InputError(f"{name}: nothing is fetched from an address; download the configuration and give its path")
    path = find_config(name)
    settings = read_yaml(path)
    names_settings = isinstance(settings, dict) and all(isinstance(key, str) for key in settings)
    if not names_settings or all(value is None for value in settings.values()):
        raise InputError(f"{path}: not a configuration of this program; it holds no settings")
    if not isinstance(settings.get(_BY_SUITE, {}), dict):
        raise InputError(f"{path}: {_BY_SUITE}: expected a part of a suite's name → settings")
    return Layer(str(path), settings)


def _inline(text: str) -> dict[str, Any] | None:
    """The settings that a text is, where it is not a name."""
    if not any(mark in text for mark in ":{\n"):  # a name
        return None
    try:
        settings = parse_yaml(text, f"{text:.40}")
    except LimitError:
        raise
    except InputError:
        return None
    return settings if isinstance(settings, dict) else None


def _on_suite(layer: Layer, parts: Sequence[str]) -> Layer:
    settings = dict(layer.settings)
    for part, changes in settings.pop(_BY_SUITE).items():
        if part in parts:
            settings = _over(settings, changes)
    return Layer(yaml.safe_dump(settings, sort_keys=False), settings)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, mapping by mapping."""
    nested = {key for key in below.keys() & above.keys() if all(isinstance(side[key], dict) for side in (below, above))}
    return {**below, **above} | {key: _over(below[key], above[key]) for key in nested}


def _suite_of(layers: Sequence[Layer]) -> str:
    names = [_get(_get(layer.settings, "suite"), "name") for layer in layers]
    return next((name for name in reversed(names) if isinstance(name, str)), "")


def _get(settings: Any, key: str) -> Any:
    return settings.get(key) if isinstance(settings, dict) else None
