"""What is learned about the merge: how many scalars weigh the task vectors, where they start, how they are bounded."""

from adaptive_merge.coefficients.linear import BlockWise, Bounds, Coefficients, Fixed, LayerWise, TaskWise

__all__ = ["BlockWise", "Bounds", "Coefficients", "Fixed", "LayerWise", "TaskWise"]
