"""Networks that use their parameters in every way there is, each with the kind of block that each parameter has."""

from tests.curvature.nets import architectures, layers, parameters
from tests.curvature.nets.core import CASES, MIXED, Case, D, K, N, Net, built, randn, tokens

__all__ = ["CASES", "MIXED", "Case", "D", "K", "N", "Net", "built", "randn", "tokens"]
assert architectures
assert layers
assert parameters
