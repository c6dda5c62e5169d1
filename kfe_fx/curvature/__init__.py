"""Curvature: second moments of each example's gradient, in the parameters and in the Kronecker-factored eigenbasis."""

from kfe_fx.curvature.blocks import Block, Blocks, find_blocks
from kfe_fx.curvature.ewc import EWC, total_penalty
from kfe_fx.curvature.fisher_rao import FisherRao, fisher_rao_norm, fisher_rao_of
from kfe_fx.curvature.fit import fit
from kfe_fx.curvature.operators import BlockOperator, Curvature
from kfe_fx.curvature.store import BlockStore, Store

__all__ = [
    "EWC",
    "Block",
    "BlockOperator",
    "BlockStore",
    "Blocks",
    "Curvature",
    "FisherRao",
    "Store",
    "find_blocks",
    "fisher_rao_norm",
    "fisher_rao_of",
    "fit",
    "total_penalty",
]
