"""What to tell a user about an error of jsonargparse: the same in fewer words, and the nearest name that there is."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Collection
from typing import Any, Final

import pytorch_lightning.callbacks
import pytorch_lightning.loggers

import adaptive_merge
from adaptive_merge.cli.allowlist import OPTION
from adaptive_merge.cli.parser import near_option
from adaptive_merge.errors import did_you_mean

__all__ = ["explain"]

_LONGEST: Final = 600  # characters of what is passed on as it is
_CLASSES = (*adaptive_merge.__all__, *pytorch_lightning.callbacks.__all__, *pytorch_lightning.loggers.__all__)
_KEY: Final = re.compile(r'Parser key "([^"]+)":?\s*')
_PROBLEM: Final = re.compile(r"Problem with given class_path '([^']+)':\n")
_CLASS: Final = re.compile(r"<class '([\w.]+)'>")
_LITERAL: Final = re.compile(r"Expected a typing\.Literal\[(.*?)\](?=[.\n]|$)")
_NO_CLASS: Final = re.compile(r"(?:Expected a dot import path string|Unexpected import path format): (\S+)")
_WORDS: Final = {
    **{"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"},
    **{"list": "a list", "Sequence": "a list", "Iterable": "a list", "dict": "a mapping", "Mapping": "a mapping"},
}


def explain(error: Exception, options: Collection[str], key: str = "") -> str:
    """What to tell the user about an error of the parser.

    Args:
        error: of jsonargparse.
        options: all that its parsers know.
        key: the setting that it is about, where the message does not say it.
    """
    message = str(error)
    if "denied by the" in message:
        advice = "Add the import path to import_path_allowlist in set_parsing_settings to allow it."
        own = f"A configuration can run what it names: if you trust it, add {OPTION} PACKAGE"
        return f"{' '.join(message.replace(advice, '').split())[-_LONGEST:]} {own}"
    if option := re.search(r"does not accept option '([^']+)'", message):
        known = [name.removeprefix("--") for name in options if name.startswith("--")]
        return message + did_you_mean(option[1], known)
    if named := _KEY.match(message):
        key, message = named[1], message[named.end() :]
    return f"{f'--{key}: ' if key else ''}{_reason(message)}{near_option(message, options)}"


def _reason(text: str) -> str:
    """The part of a message that says what is wrong, without the types that did not fit either."""
    if problem := _PROBLEM.search(text):
        path, inner = problem[1], _indented(text[problem.end() :])
        if unknown := re.search(r"Option '([^']+)' is not accepted", inner):
            return f"{_short(path)} has no argument {unknown[1]!r}{_choose(unknown[1], _arguments(path))}"
        named = _KEY.match(inner)
        return f"{_short(path)}: {f'{named[1]}: ' if named else ''}{_reason(inner[named.end() :] if named else inner)}"
    value = _given(text)
    if missing := _NO_CLASS.search(text):
        fitting = _fitting(text)
        hint = _choose(missing[1].rpartition(".")[2], fitting) or did_you_mean(missing[1], _CLASSES)
        return f"there is no class {missing[1]!r}{hint}"
    choices = [choice.strip("'\" ") for group in _LITERAL.findall(text) for choice in group.split(",")]
    types = [_WORDS[name] for name in re.findall(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>", text) if name in _WORDS]
    if choices:
        near = did_you_mean(value[7:-1], [*choices, *_CLASSES])  # with these, too many for a list of all
        return f"expected {', '.join(dict.fromkeys(choices + types))}{value}{near}"
    if types:
        return f"expected {' or '.join(dict.fromkeys(types))}{value}"
    if "Unable to load config" in text:
        return "expected a mapping of settings, or a file that holds one"
    return " ".join(text.split())[:_LONGEST]


def _indented(text: str) -> str:
    """The lines that are indented at least as far as the first, without the indentation."""
    lines = text.split("\n")
    depth = len(lines[0]) - len(lines[0].lstrip())
    end = next((i for i, line in enumerate(lines) if line.strip() and len(line) - len(line.lstrip()) < depth), None)
    return "\n".join(line[depth:] for line in lines[:end]).strip()


def _given(text: str) -> str:
    found = re.search(r"Given value: (.*)", text) or re.search(r"Got value: (.*)", text)
    plain = found and re.fullmatch(r"(?:NestedArg\(key='\w+', val=')?([^(){}\[\]]{1,60}?)(?:'\))?", found[1].strip())
    return f", got {plain[1]!r}" if plain else ""


def _fitting(text: str) -> list[str]:
    """Short names of the classes that would have fitted: what derives from the types that a message names."""
    bases = [base for path in _CLASS.findall(text) if isinstance(base := _loaded(path), type)]
    bases = [base for base in bases if base.__module__.startswith((adaptive_merge.__name__, "pytorch_lightning"))]
    return sorted(
        name for name in _CLASSES if isinstance(one := _by_name(name), type) and issubclass(one, tuple(bases))
    )


def _by_name(name: str) -> Any:
    places = (adaptive_merge, pytorch_lightning.callbacks, pytorch_lightning.loggers)
    return next((getattr(place, name) for place in places if name in place.__all__), None)


def _loaded(path: str) -> Any:
    """What a path names, if its module is already imported; nothing is imported for a message."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _arguments(path: str) -> list[str]:
    kind = _loaded(path)
    return [name for name in inspect.signature(kind).parameters if name != "self"] if callable(kind) else []


def _choose(name: str, known: Collection[str]) -> str:
    return did_you_mean(name, known) or (f"; choose {', '.join(known)}" if known else "")


def _short(path: str) -> str:
    return path.rpartition(".")[2]
