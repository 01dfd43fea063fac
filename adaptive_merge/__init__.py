"""Adapt merged models at test time: coefficients, surgery adapters and tints learned on unlabelled batches.

The public names are loaded when they are first used, so that `adaptive-merge --version` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "callbacks": ["Guard", "Ledger"],
    "cli.loading": ["load_checkpoint", "load_run"],
    "cli.script": ["fit"],
    "data": ["Corruption", "Holdout", "Images", "Online", "Protocol", "TaskStream", "Transductive", "Unseen"],
    "engine.module": ["AdaptiveMerge"],
    "errors": ["AdaptiveMergeError", "InputError", "MissingFileError"],
    "export": ["export_model", "export_tall", "load_adapters", "load_module", "load_tall", "save_adapters"],
    "adapters.dense": ["DenseHead", "MeanIoU"],
    "adapters.heads": ["CosineHead", "Head", "LinearHead"],
    "merge": ["MergedBackbone", "TaskVectors"],
    "objectives.base": ["Prediction"],
    "recipes": [
        *("AdaMerging", "AdaMergingPP", "Surgery", "SurgeryV2", "TaskArithmetic"),
        *("TiesMerging", "Tinting", "TintingPP", "WeightAveraging"),
    ],
    "runs.online": ["prequential"],
    "runs.results": ["evaluate", "score"],
    "schedule": ["Stage"],
    "suites": ["Suite", "load_suite"],
    "suites.clip_suite": ["ClipSuite", "load_clip_suite"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# Every class of these is public: a new one is one new file.
_PARTS = ("transforms", "coefficients", "adapters", "objectives", "starts")


def __getattr__(name: str) -> Any:
    if name == "__all__":
        parts = [importlib.import_module(f"adaptive_merge.{part}").__all__ for part in _PARTS]
        return sorted({*_HOME_OF, *(name for part in parts for name in part if name[0].isupper())}) + ["__version__"]
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"adaptive_merge.{_HOME_OF[name]}"), name)
    # Capitals only: `adaptive_merge.data` and the like are looked up here before they are imported.
    for part in _PARTS if name[:1].isupper() else ():
        module = importlib.import_module(f"adaptive_merge.{part}")
        if name in module.__all__:
            return getattr(module, name)
    raise AttributeError(f"module 'adaptive_merge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __getattr__("__all__")
