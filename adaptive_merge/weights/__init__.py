"""Third-party weights, read safely: nothing in a file is run, every size is checked before it is allocated."""

from adaptive_merge.weights.heads import read_head
from adaptive_merge.weights.lineage import check_agreement
from adaptive_merge.weights.manifest import Manifest, Weights
from adaptive_merge.weights.reader import Reader
from adaptive_merge.weights.sources import read_weights

__all__ = [
    "Manifest",
    "Reader",
    "Weights",
    "check_agreement",
    "read_head",
    "read_weights",
]
