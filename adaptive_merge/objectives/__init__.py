"""Part 4 of a method, what an unlabelled batch asks for: losses per image, alone or against the task's own expert."""

from adaptive_merge.objectives.base import Objective, Prediction
from adaptive_merge.objectives.functional import (
    confidence_filter,
    entropy,
    feature_distance,
    jensen_shannon,
    normalised_entropy,
)
from adaptive_merge.parts import kinds

globals().update(names := kinds(__name__, Objective))
__all__ = [
    "Prediction",
    "confidence_filter",
    "entropy",
    "feature_distance",
    "jensen_shannon",
    "normalised_entropy",
    *names,
]
