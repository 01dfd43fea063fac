"""What an unlabelled batch asks for: losses per image, on predictions alone or against the task's own expert."""

from adaptive_merge.objectives.base import Objective, Prediction
from adaptive_merge.objectives.entropy import Entropy
from adaptive_merge.objectives.functional import (
    Distance,
    confidence_filter,
    entropy,
    feature_distance,
    jensen_shannon,
    normalised_entropy,
)
from adaptive_merge.objectives.taught import ExpertDivergence, FeatureDistance, PseudoLabel

__all__ = [
    "Distance",
    "Entropy",
    "ExpertDivergence",
    "FeatureDistance",
    "Objective",
    "Prediction",
    "PseudoLabel",
    "confidence_filter",
    "entropy",
    "feature_distance",
    "jensen_shannon",
    "normalised_entropy",
]
