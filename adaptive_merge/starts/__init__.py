"""Starts: what the unlabelled stream gives before any gradient; merges in closed form."""

from adaptive_merge.starts.base import Problem, Solution, Start, Store
from adaptive_merge.starts.choose import Choice, Chosen, choose
from adaptive_merge.starts.fisher import Fisher
from adaptive_merge.starts.mats import MaTS
from adaptive_merge.starts.regmean import LOT, RegMean, RegMeanPP
from adaptive_merge.starts.regression import CompensatedRegression, FeatCal
from adaptive_merge.starts.store import FileStore

__all__ = [
    "LOT",
    "Choice",
    "Chosen",
    "CompensatedRegression",
    "FeatCal",
    "FileStore",
    "Fisher",
    "MaTS",
    "Problem",
    "RegMean",
    "RegMeanPP",
    "Solution",
    "Start",
    "Store",
    "choose",
]
