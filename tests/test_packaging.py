"""What pyproject.toml says about the package is so."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import adaptive_merge

PACKAGE = Path(adaptive_merge.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
# Some imports wait inside a function for an extra, or for what writes the model that is exported.
OPTIONAL = {"sklearn", "onnxruntime", "transformers"}


def imported() -> dict[str, set[str]]:
    """Top-level name of what is neither ours nor Python's → the files that import it."""
    files: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in {module.partition(".")[0] for module in modules}:
                if name not in sys.stdlib_module_names and name != PACKAGE.name:
                    files.setdefault(name, set()).add(str(path.relative_to(PACKAGE)))
    return files


def normalised(requirement: str) -> str:
    """The distribution's name as indexes compare it, without extras and versions."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def declared(*extras: str) -> set[str]:
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {normalised(requirement) for group in groups for requirement in group}


def test_what_is_imported_is_declared():
    distributions = packages_distributions()
    assert {"torch", "numpy", "PIL"} <= imported().keys()  # the search sees something
    for name, files in imported().items():
        owners = {normalised(owner) for owner in distributions.get(name, [name])}
        known = declared("report", "export", "clip", "test") if name in OPTIONAL else declared()
        assert owners & known, f"{name}, imported by {sorted(files)[:3]}, is not declared in pyproject.toml"


@pytest.mark.parametrize(
    "requirement",
    [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ],
)
def test_every_dependency_has_a_lower_bound(requirement):
    assert ">=" in requirement or normalised(requirement) == normalised(PROJECT["name"])


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
