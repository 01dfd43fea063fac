"""The hot path: θ₀ and τ in flat buffers, the two passes over them, where they live, and the merged backbone."""

from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.passes import combine, project
from adaptive_merge.merge.rule import Rule
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["Layout", "MergedBackbone", "Rule", "TaskVectors", "combine", "project"]
