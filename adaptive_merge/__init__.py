"""Adapt merged models at test time: coefficients, surgery adapters and tints learned on unlabelled batches.

The public names are loaded when they are first used, so that `adaptive-merge --version` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "adapters": ["Adapter", "BlockSurgery", "FeatureSurgery", "Tint"],
    "callbacks": ["Guard", "Ledger"],
    "coefficients": ["BlockWise", "Coefficients", "Fixed", "LayerWise", "TaskWise"],
    "data": [
        *("Corruption", "Holdout", "Images", "Online", "Protocol", "TaskStream", "Transductive", "Unseen"),
    ],
    "suites.clip_suite": ["ClipSuite", "load_clip_suite"],
    "errors": ["AdaptiveMergeError", "InputError", "MissingFileError"],
    "export": ["export_model", "load_adapters", "save_adapters"],
    "heads": ["CosineHead", "Head", "LinearHead"],
    "merge": ["MergedBackbone", "Rule", "TaskVectors"],
    "engine.module": ["AdaptiveMerge"],
    "runs.online": ["prequential"],
    "objectives": ["Entropy", "ExpertDivergence", "FeatureDistance", "Objective", "Prediction", "PseudoLabel"],
    "recipes": [
        *("AdaMerging", "AdaMergingPP", "Surgery", "SurgeryV2", "TaskArithmetic"),
        *("TiesMerging", "Tinting", "TintingPP", "WeightAveraging"),
    ],
    "runs.results": ["evaluate", "score"],
    "schedule": ["Stage"],
    "suites": ["Suite", "load_suite"],
    "transforms": ["Ties", "Transform"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME_OF), "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'adaptive_merge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"adaptive_merge.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
