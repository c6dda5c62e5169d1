"""Low-rank decompositions of layers: eigenbases, singular directions, ranks, and factors in the graph."""

from kfe_fx.lowrank.candidates import Candidate, apply, candidates, choose
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.kfe import Kfe
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.losses import with_fisher_losses
from kfe_fx.lowrank.measure import measure
from kfe_fx.lowrank.prices import Prices
from kfe_fx.lowrank.svd import Svd

__all__ = [
    "Candidate",
    "Kfe",
    "Layer",
    "Prices",
    "Svd",
    "apply",
    "candidates",
    "choose",
    "find_layers",
    "measure",
    "with_fisher_losses",
]
