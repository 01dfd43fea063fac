"""What a file may ask for: the bounds of everything that is read, and the text files that are read within them.

Each bound is far above what published checkpoints, suites and data sets have, and low enough that a file beyond it is
refused within seconds and before memory is taken. docs/reliability.md lists them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import yaml

from adaptive_merge.errors import InputError, MissingFileError, printable

__all__ = [
    "LimitError",
    "check_header",
    "check_names",
    "check_nesting",
    "parse_yaml",
    "read_json",
    "read_text",
    "read_yaml",
]

TEXT_BYTES: Final = 16 << 20  # of a JSON, YAML or text file
VALUES: Final = 100_000  # in a configuration, those behind aliases counted as often as they are named
NESTING: Final = 100  # levels of a configuration, or of a results file
NAME: Final = 200  # characters in the name of a task, a class, or a folder of a run
TENSOR_NAME: Final = 1_000  # characters
TENSORS: Final = 100_000  # in a checkpoint
LAYERS: Final = 1_000  # blocks of a tower
HEADER_BYTES: Final = 16 << 20  # of a safetensors file
PICKLE_BYTES: Final = 256 << 20  # of a `data.pkl`, without the numbers
OPCODES: Final = 2_000_000  # of a pickle
MODULES: Final = 100_000  # in a pickled model, of which at most `MODULE_DEPTH` inside each other
MODULE_DEPTH: Final = 32
TUPLE_KEYS: Final = 1_000  # keys of dictionaries in a pickle that are tuples, and values in one of them
PATTERN_REPETITIONS: Final = 2  # `*`, `+` and `{` in a pattern of a LoRA adapter's settings, none of them after a group
DIMENSIONS: Final = 8  # of a tensor
DIRECTORY_BYTES: Final = 16 << 20  # of the list of records in a zip
ARRAY_BYTES: Final = 1 << 30  # that an array of an npz may unpack to
PIXELS: Final = 100_000_000  # of an image, as it is stored and as it is resized
IMAGE_FORMATS: Final = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # that Pillow may try; MPO is a JPEG


class LimitError(InputError):
    """A file or text that asks for more than anything that is read here has."""


def read_text(path: Path) -> str:
    """The content of a regular UTF-8 file within `TEXT_BYTES`.

    Raises:
        MissingFileError, InputError: naming the file and the remedy.
    """
    if not path.exists():
        raise MissingFileError(f"{path}: there is no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file; give a file")
    try:
        size = path.stat().st_size
        if size > TEXT_BYTES:
            raise LimitError(f"{path}: refused, {size:,} bytes of text, expected at most {TEXT_BYTES:,}")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as UTF-8 text ({error}); write or copy it again") from error


def read_json(path: Path, strict: bool = True) -> dict[str, Any]:
    """The object in a JSON file within the limits.

    Args:
        strict: refuse NaN and Infinity, which JSON does not have and older versions wrote into results.

    Raises:
        MissingFileError, InputError: naming the file and the remedy.
    """
    try:
        content = json.loads(read_text(path), parse_constant=_no_number if strict else float)
    except InputError:
        raise
    except RecursionError as error:
        raise LimitError(f"{path}: refused, more than {NESTING} levels") from error
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); write or copy it again") from error
    check_nesting(content, str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def read_yaml(path: Path) -> Any:
    """The content of a YAML file within the limits.

    Raises:
        MissingFileError, InputError: naming the file and the remedy.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, name: str) -> Any:
    """What a YAML text holds.

    Args:
        name: how messages call it.
    """
    try:
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise LimitError(f"{name}: refused, more than {NESTING} levels") from error
    except Exception as error:  # beside YAMLError its constructors raise ValueError, KeyError, IndexError, ...
        raise InputError(f"{name}: not readable as YAML ({error})") from error
    check_nesting(content, name)
    return content


def check_nesting(content: Any, name: str) -> None:
    """InputError where nested lists and mappings are too many, too deep or inside themselves.

    What an alias names is counted each time: written out again, a few lines of aliases would fill the memory.
    """
    sizes: dict[int, tuple[int, int]] = {}  # of what was counted: values, and levels below it
    open_: set[int] = set()
    stack: list[tuple[Any, bool]] = [(content, False)]
    while stack:
        part, counted = stack.pop()
        if id(part) in sizes or not isinstance(part, (dict, list, tuple, set)):
            continue
        children = [*part.keys(), *part.values()] if isinstance(part, dict) else [*part]
        if not counted:
            if id(part) in open_:
                raise LimitError(f"{name}: refused, an alias names what it is in; write it out")
            open_.add(id(part))
            stack += [(part, True), *((child, False) for child in children)]
            continue
        below = [sizes.get(id(child), (1, 0)) for child in children]
        size = sizes[id(part)] = (1 + sum(count for count, _ in below), 1 + max((deep for _, deep in below), default=0))
        if size[0] > VALUES or size[1] > NESTING:
            raise LimitError(f"{name}: refused, more than {VALUES:,} values (with aliases) or {NESTING} levels of them")


def check_names(names: Iterable[Any], what: str, path: str | Path, *, folder: bool = False) -> None:
    """InputError unless all names are short, printable text; `folder`: and can be a file's name."""
    for name in names:
        plain = isinstance(name, str) and 0 < len(name) <= NAME and printable(name) == name and "\n" not in name
        if not plain or (folder and ("/" in name or "\\" in name or name in (".", ".."))):
            shown = printable(repr(name))[:60]
            raise InputError(
                f"{path}: {shown} cannot be the name of a {what}: expected up to {NAME} printable characters"
                f"{', without slashes' if folder else ''}; rename it"
            )


def check_header(path: Path) -> None:
    """InputError where the header of a safetensors file is larger than the file or than `HEADER_BYTES`."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > min(HEADER_BYTES, path.stat().st_size):
        raise InputError(
            f"`{path}`: not a readable safetensors file (a header of {size:,} bytes, expected at most "
            f"{HEADER_BYTES:,} and no more than the file has); copy or download it again"
        )


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
