"""Singular directions: the best factors of a rank, of the weight and of the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfe_fx.errors import UsageError
from kfe_fx.lowrank.candidates import applied
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.layers import Layer
from kfe_fx.lowrank.svd import Svd
from kfe_fx.program import Program
from tests.lowrank.nets import FAMILIES, case, composed, fitted, store


def weight_of(program: Program, layer: Layer) -> Tensor:
    return composed(program, layer).flatten(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_factors_are_the_best_of_their_rank(name: str) -> None:
    """Eckart & Young: what is lost is the tail of the squared singular values, and no more."""
    made = case(name)
    layer = made.layer
    found = Svd.of(made.program, layer)
    whole = weight_of(made.program, layer)
    for rank in range(1, min(whole.shape)):
        small = applied(made.program, {"layer": found}, {"layer": (layer.columns, rank)})
        after = next(each for each in find_layers(small).layers if each.name == "layer")
        assert [made_by for _, _, made_by in after.steps(after.columns, after.rows)] == [rank, whole.shape[0]]
        lost = (weight_of(small, after) - whole).square().sum()
        expected = torch.linalg.svdvals(whole)[rank:].square().sum()
        torch.testing.assert_close(lost, expected, rtol=1e-9, atol=1e-13)
        assert found.loss(layer.columns, rank) == pytest.approx(float(expected / whole.square().sum()), rel=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_of_outputs_it_is_the_mean_square_of_what_comes_out_wrong(name: str) -> None:
    """Against the layer run on the data; and never worse there than the directions of the weight."""
    made = case(name)
    layer = made.layer
    made.module.eval()

    def outputs(program: Program) -> Tensor:
        """The layer's outputs without its bias, one row each, through whatever it is made of."""
        seen: list[Tensor] = []
        names = {next(each for each in find_layers(program).layers if each.name == "layer").ops[-1].nodes["eval"][0]}

        class Record(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                value = super().run_node(n)
                if n.name in names:
                    seen.append(value)
                return value

        Record(program.module(), graph=program.graphs["eval"]).run(made.inputs)
        last = made.module.layer
        out = seen[0].movedim(1, -1) if not isinstance(last, torch.nn.Linear) else seen[0]
        bias = last.bias
        return (out if bias is None else out - bias).detach().reshape(-1, out.shape[-1])  # type: ignore[operator]

    whole = outputs(made.program)
    by = {"weights": Svd.of(made.program, layer), "outputs": Svd.of(made.program, layer, fitted(name))}
    for rank in range(1, layer.rows):
        wrong = {}
        for of, axes in by.items():
            small = applied(made.program, {"layer": axes}, {"layer": (layer.columns, rank)})
            wrong[of] = float((outputs(small) - whole).square().sum() / whole.square().sum())
        assert by["outputs"].loss(layer.columns, rank) == pytest.approx(wrong["outputs"], rel=1e-7, abs=1e-10)
        assert wrong["outputs"] <= wrong["weights"] * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("name", ["conv2d", "linear", "conv2d 1x1"])
def test_what_is_in_factors_is_decomposed_as_their_product(name: str) -> None:
    made = case(name)
    layer = made.layer
    first = applied(made.program, {"layer": Svd.of(made.program, layer)}, {"layer": (layer.columns, 3)})
    pair = next(each for each in find_layers(first).layers if each.name == "layer")
    second = applied(first, {"layer": Svd.of(first, pair)}, {"layer": (pair.columns, 2)})
    again = next(each for each in find_layers(second).layers if each.name == "layer")
    at_once = applied(made.program, {"layer": Svd.of(made.program, layer)}, {"layer": (layer.columns, 2)})
    direct = next(each for each in find_layers(at_once).layers if each.name == "layer")
    assert [op.shape for op in again.ops] == [op.shape for op in direct.ops]
    torch.testing.assert_close(weight_of(second, again), weight_of(at_once, direct), rtol=1e-9, atol=1e-12)


def test_statistics_that_do_not_know_the_layer_are_refused() -> None:
    made = case("conv2d")
    head = next(layer for layer in find_layers(made.program).layers if layer.name == "head")
    with pytest.raises(UsageError, match=r"no Kronecker factors of head\.weight"):
        Svd.of(made.program, head, store("conv2d"))
