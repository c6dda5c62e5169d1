"""Curvature: second moments of each example's gradient, in the parameters and in the Kronecker-factored eigenbasis."""

from kfe_fx.curvature.blocks import Block, Blocks, find_blocks
from kfe_fx.curvature.fit import fit
from kfe_fx.curvature.store import BlockStore, Store

__all__ = ["Block", "BlockStore", "Blocks", "Store", "find_blocks", "fit"]
