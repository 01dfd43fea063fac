"""`adaptive-merge recipes`: what ships, read from the files themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from adaptive_merge.cli.configs import recipe_files
from adaptive_merge.cli.parser import Parser, write
from adaptive_merge.files import shipped

__all__ = ["recipes"]


def recipes(arguments: list[str]) -> None:
    """List the recipes and suites that --config knows by name: what each is, what it learns, what was published."""
    Parser("adaptive-merge recipes", description=recipes.__doc__).parse_args(arguments)
    for name, path in recipe_files().items():
        title, source = _header(path)
        learns = _learns(yaml.safe_load(path.read_text()).get("model"))
        write(f"{name}\n    {title}" + "".join(f"\n    {line}" for line in (learns, source) if line))
    write(f"\nThe files are in {shipped()}. A CLIP recipe goes with a suite:")
    write("adaptive-merge fit --config clip/adamerging --config clip/vit_b_32/8tasks")


def _header(path: Path) -> tuple[str, str]:
    """The comment that a file begins with: what the recipe is, and the means published for it."""
    lines = path.read_text().splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    title, *source = re.split(r"(?<=\.) (?=Published|No published)", comment)
    return title, " ".join(source)


def _learns(model: Mapping[str, Any] | None) -> str:
    """The start and the parts that training changes, by the names of their classes; empty for what is no method."""
    if model is None:
        return ""
    names = [_class(part) for part in (model["coefficients"], *model.get("adapters", ()))]
    begins = f"Starts with: {_class(model['start'])}. " if "start" in model else ""
    return f"{begins}Learns: {', '.join(name for name in names if name != 'Fixed') or 'nothing'}."


def _class(part: Any) -> str:
    return part if isinstance(part, str) else part["class_path"]
