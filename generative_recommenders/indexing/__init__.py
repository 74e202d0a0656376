"""The best items of the whole catalogue for each query, exact and approximate."""

from .mol_top_k import MoLAvgTopK, MoLBruteForceTopK, MoLCombTopK, MoLNaiveTopK, make_top_k
from .top_k import BruteForceTopK, MIPSBruteForceTopK

__all__ = [
    "BruteForceTopK",
    "MIPSBruteForceTopK",
    "MoLAvgTopK",
    "MoLBruteForceTopK",
    "MoLCombTopK",
    "MoLNaiveTopK",
    "make_top_k",
]
