"""Strangers' weights, read safely: nothing in a file is run, every size is checked before it is allocated."""

from adaptive_merge.checkpoints.agreement import check_agreement
from adaptive_merge.checkpoints.coefficients import load_coefficients, save_coefficients
from adaptive_merge.checkpoints.heads import read_head
from adaptive_merge.checkpoints.manifest import Manifest, Weights
from adaptive_merge.checkpoints.published import read_adamerging, read_fusion_bench, read_tinting
from adaptive_merge.checkpoints.reader import read_weights

__all__ = [
    "Manifest",
    "Weights",
    "check_agreement",
    "load_coefficients",
    "read_adamerging",
    "read_fusion_bench",
    "read_head",
    "read_tinting",
    "read_weights",
    "save_coefficients",
]
