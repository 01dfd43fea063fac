"""What the task vectors look like before merging: pure functions `TaskVectors → TaskVectors`, one file a method."""

from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.breadcrumbs import Breadcrumbs
from adaptive_merge.transforms.cart import CART
from adaptive_merge.transforms.consensus import Consensus, tall_masks
from adaptive_merge.transforms.dare import DARE
from adaptive_merge.transforms.doge import DOGE
from adaptive_merge.transforms.iso_c import IsoC
from adaptive_merge.transforms.iso_cts import IsoCTS
from adaptive_merge.transforms.layer_drop import LayerDrop
from adaptive_merge.transforms.lines import LiNeS
from adaptive_merge.transforms.star import STAR
from adaptive_merge.transforms.svc import SVC
from adaptive_merge.transforms.ties import Ties, ties
from adaptive_merge.transforms.tsvm import TSVM
from adaptive_merge.transforms.wudi import WUDI

__all__ = [
    "CART",
    "DARE",
    "DOGE",
    "STAR",
    "SVC",
    "TSVM",
    "WUDI",
    "Breadcrumbs",
    "Consensus",
    "IsoC",
    "IsoCTS",
    "LayerDrop",
    "LiNeS",
    "Ties",
    "Transform",
    "tall_masks",
    "ties",
]
