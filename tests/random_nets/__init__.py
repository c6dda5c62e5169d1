"""Random networks for tests: one grammar behind a hypothesis strategy and behind plain seeds.

    from tests.random_nets import nets, sample_net

    @given(case=nets(max_blocks=3))
    def test_something(case): case.module(*case.inputs) ...

    for seed in range(10_000): case = sample_net(seed)

A family is a class in one of the files beside this one, registered with @family; a new one needs nothing else.
"""

from .core import STEPS, Drawing, Options, Raw, Shape, Step, family
from .network import FAMILIES, Case, RandomNet, case_of, draw_description, nets, outputs, sample_net

__all__ = [
    "FAMILIES",
    "STEPS",
    "Case",
    "Drawing",
    "Options",
    "RandomNet",
    "Raw",
    "Shape",
    "Step",
    "case_of",
    "draw_description",
    "family",
    "nets",
    "outputs",
    "sample_net",
]
