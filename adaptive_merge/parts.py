"""The parts that a method is a choice of: every class of a kind in a part's folder belongs to that part.

So a new transform, rule, adapter, objective or start is one new file, and is listed nowhere else.
"""

from __future__ import annotations

import importlib
import pkgutil

__all__ = ["kinds"]


def kinds(package: str, base: type) -> dict[str, type]:
    """Name → class: `base` and all public classes that derive from it in the modules of a package, sorted by name."""
    folder = importlib.import_module(package).__path__
    modules = [importlib.import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(folder)]
    public = {name: getattr(module, name) for module in modules for name in module.__all__}
    classes = {name: value for name, value in public.items() if isinstance(value, type) and issubclass(value, base)}
    return dict(sorted((classes | {base.__name__: base}).items()))
