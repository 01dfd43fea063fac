"""Suites: a pre-trained model, its experts, their heads and test images, loaded together."""

from adaptive_merge.suites.base import Suite
from adaptive_merge.suites.loading import load_suite

__all__ = ["Suite", "load_suite"]
