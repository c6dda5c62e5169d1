"""Importances in the eigenbasis against dense curvature, per-example gradients and patches taken by hand."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kfe_fx.curvature import find_blocks
from kfe_fx.errors import UsageError
from kfe_fx.lowrank.candidates import apply
from kfe_fx.lowrank.finding import find_layers
from kfe_fx.lowrank.kfe import Kfe, channel_factor
from kfe_fx.lowrank.losses import with_fisher_losses
from kfe_fx.lowrank.measure import measure
from tests.lowrank.nets import CLASSES, FAMILIES, Case, case, composed, fitted, store

TIGHT = {"rtol": 1e-9, "atol": 1e-14}


def dense_weight(made: Case) -> Tensor:
    """The weight as [o, C, T]."""
    held = made.module.layer.weight.detach()
    return held.reshape(*held.shape[:2], -1)  # type: ignore[operator]


def gradients(made: Case) -> list[tuple[float, Tensor]]:
    """Return every (weight, gradient of log p by the layer's weight) of each example and class: the exact source."""
    made.module.eval()
    found = []
    for x in made.inputs:
        logs = F.log_softmax(made.module(x[None]), -1)[0]
        for label in range(CLASSES):
            (grad,) = torch.autograd.grad(logs[label], [made.module.layer.weight], retain_graph=True)  # type: ignore[list-item]
            found.append((float(logs[label].exp().detach()), grad.reshape(dense_weight(made).shape)))
    return found


def factors(name: str) -> tuple[Tensor, Tensor]:
    held = store(name).blocks["layer.weight"]
    assert held.G is not None
    return channel_factor(held, case(name).layer.measured), held.G[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_channel_factor_is_the_second_moment_of_all_entries_of_all_patches(name: str) -> None:
    made = case(name)
    seen: list[Tensor] = []
    layer = made.module.layer
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    made.module.eval()(made.inputs)
    hook.remove()
    x = seen[0]
    if isinstance(layer, torch.nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
    else:
        # a patch entry by entry: convolve with a kernel that picks one channel and one element
        channels, kernel = layer.in_channels, tuple(layer.kernel_size)  # type: ignore[arg-type]
        taps = torch.Size(kernel).numel()
        pick = torch.eye(channels * taps).double().reshape(channels * taps, channels, *kernel)
        if layer.padding_mode != "zeros":  # type: ignore[operator]
            x = F.pad(x, [1, 1, 1, 1], mode="reflect")
        padding = 0 if layer.padding_mode != "zeros" else layer.padding  # type: ignore[operator]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
        entries = convolve(x, pick, None, layer.stride, padding, layer.dilation)  # type: ignore[arg-type]
        rows = entries.reshape(len(x), channels, taps, -1).permute(0, 2, 3, 1).reshape(-1, channels)
    A, _ = factors(name)
    torch.testing.assert_close(A, rows.T @ rows / len(rows), **TIGHT)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_importances_add_up_to_the_quadratic_form(name: str) -> None:
    """T3.1: half their sum is 1/2 vec(W)^T (G (x) A (x) 1) vec(W)."""
    made = case(name)
    A, G = factors(name)
    weight = dense_weight(made)
    F_dense = torch.kron(torch.kron(G, A), torch.eye(weight.shape[2]).double())
    expected = weight.reshape(-1) @ F_dense @ weight.reshape(-1) / 2
    found = Kfe.of(made.program, store(name), made.layer)
    assert float(expected) > 0
    torch.testing.assert_close(torch.tensor(found.total, dtype=torch.float64), expected.detach(), **TIGHT)
    torch.testing.assert_close(found.row_scores.sum(), 2 * expected.detach(), **TIGHT)
    torch.testing.assert_close(found.column_scores.sum(), 2 * expected.detach(), **TIGHT)


def turned(found: Kfe, values: Tensor) -> Tensor:
    return torch.einsum("oct,oj,ck->jkt", values, found.U_G, found.U_A)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_measured_moments_are_those_of_each_examples_gradient(name: str) -> None:
    made = case(name)
    found = Kfe.of(made.program, store(name, "moments"), made.layer, "moments")
    S = sum(p * turned(found, grad).square() for p, grad in gradients(made)) / len(made.inputs)
    expected = (turned(found, dense_weight(made)).square() * S).sum(-1)
    torch.testing.assert_close(found.importance, expected, **TIGHT)


@pytest.mark.parametrize("name", FAMILIES)
def test_moments_of_whole_patches_become_the_diagonal_of_their_curvature_in_the_channels_basis(name: str) -> None:
    made = case(name)
    found = Kfe.of(made.program, fitted(name), made.layer, "moments")
    block = next(block for block in find_blocks(made.program).blocks if block.weight == "layer.weight")
    curvature = fitted(name).operator(made.program, "ekfac").blocks["layer.weight"].dense()
    o, c, t = dense_weight(made).shape
    entries = torch.arange(curvature.shape[0]).reshape(block.shape[1:])[:, : c * t].reshape(-1)
    inner = curvature[entries][:, entries]
    Q = torch.kron(torch.kron(found.U_G, found.U_A), torch.eye(t).double())
    diagonal = (Q.T @ inner @ Q).diagonal().reshape(o, c, t)
    expected = (turned(found, dense_weight(made)).square() * diagonal).sum(-1)
    torch.testing.assert_close(found.importance, expected, **TIGHT)


@pytest.mark.parametrize("statistics", ["product", "moments"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_predicted_loss_is_the_quadratic_form_of_what_really_changed(name: str, statistics: str) -> None:
    made = case(name)
    layer, held = made.layer, store(name, statistics)
    found = Kfe.of(made.program, held, layer, statistics)
    weight = dense_weight(made)
    taps = torch.eye(weight.shape[2]).double()
    if statistics == "product":
        A, G = factors(name)
        curvature = torch.kron(torch.kron(G, A), taps)
    else:
        Q = torch.kron(torch.kron(found.U_G, found.U_A), taps)
        S = sum(p * turned(found, grad).square() for p, grad in gradients(made)) / len(made.inputs)
        curvature = Q @ S.reshape(-1).diag() @ Q.T
    for c, r in ((layer.columns - 1, layer.rows), (layer.columns, 1), (layer.columns - 1, layer.rows - 1), (1, 2)):
        small = apply(made.program, held, {"layer": (c, r)}, statistics=statistics)
        (after,) = [each for each in find_layers(small).layers if each.name == "layer"]
        change = (composed(small, after) - weight).reshape(-1)
        expected = change @ curvature @ change / 2
        torch.testing.assert_close(torch.tensor(found.loss(c, r), dtype=torch.float64), expected, rtol=1e-8, atol=1e-13)
        assert found.loss(c, r) > 0
    assert found.loss(layer.columns, layer.rows) == 0.0


@pytest.mark.parametrize("name", FAMILIES)
def test_with_the_identity_for_a_factor_the_axes_are_principal_components(name: str) -> None:
    """T3.5: with A = 1 the columns are the principal components of the rows of W under G; with G = 1 likewise."""
    made, weight = case(name), dense_weight(case(name)).detach()
    A, G = factors(name)
    for side in "AG":
        held = measure(made.program, made.data, [made.layer], source="exact", batch_size=4)
        block = held.blocks["layer.weight"]
        factor = getattr(block, side)
        assert factor is not None
        counted = block.sums[side] / factor  # what the sum is divided by
        scale = float(counted[counted.isfinite()].median())
        block.sums[side] = torch.eye(factor.shape[-1]).double().unsqueeze(0) * scale
        found = Kfe.of(made.program, held, made.layer)
        equation = "oct,op,pdt->cd" if side == "A" else "oct,cd,pdt->op"
        carried = torch.einsum(equation, weight, G if side == "A" else A, weight)
        values, vectors = (part.flip(-1) for part in torch.linalg.eigh(carried))
        scores, axes = (found.column_scores, found.U_A) if side == "A" else (found.row_scores, found.U_G)
        torch.testing.assert_close(scores, values.clamp_min(0), rtol=1e-8, atol=1e-12)
        apart = values[:-1] - values[1:] > 1e-6 * values[0]
        overlap = (axes.T @ vectors).abs().diagonal()
        alone = torch.cat([apart, apart.new_ones(1)]) & torch.cat([apart.new_ones(1), apart])
        assert alone.any()
        torch.testing.assert_close(overlap[alone], torch.ones_like(overlap[alone]), rtol=0, atol=1e-8)
        # no basis loses less with as many columns (Ky Fan)
        assert found.importance_lost(*((1, made.layer.rows) if side == "A" else (made.layer.columns, 1))) == (
            pytest.approx(float(values[1:].sum()) / 2, rel=1e-8, abs=1e-12)
        )


def test_eigenvalues_that_are_nothing_are_zero() -> None:
    """Inputs that lie in a plane leave columns without importance, in spite of rounding."""
    made = case("linear")
    flat = torch.zeros_like(made.inputs)
    flat[:, :2] = made.inputs[:, :2]
    found = Kfe.of(made.program, measure(made.program, flat, [made.layer], source="exact"), made.layer)
    assert int((found.column_scores > 0).sum()) == 2


def test_a_store_that_says_too_little_is_refused_with_what_to_do() -> None:
    made = case("conv2d")
    with pytest.raises(UsageError, match=r"hold no S\* of layer.weight; fit 'ekfac'"):
        Kfe.of(made.program, store("conv2d"), made.layer, "moments")
    head = next(layer for layer in find_layers(made.program).layers if layer.name == "head")
    with pytest.raises(UsageError, match=r"hold no Kronecker factors of head\.weight"):
        Kfe.of(made.program, store("conv2d"), head)
    with pytest.raises(UsageError, match="there are the statistics product and moments"):
        measure(made.program, made.data, [made.layer], "squares")


@pytest.mark.parametrize("name", FAMILIES)
def test_measured_losses_are_those_of_each_examples_gradient_along_what_changed(name: str) -> None:
    """1/2 E_n[<dW_n, dW>^2], the sum before the square, for every pair of ranks, against the weights of the result."""
    made = case(name)
    layer = made.layer
    axes = {"layer": Kfe.of(made.program, store(name), layer)}
    found = with_fisher_losses(made.program, made.data, axes, loss="cross-entropy", source="exact", batch_size=4)[
        "layer"
    ]
    weight = dense_weight(made)
    for c, r in product(range(1, layer.columns + 1), range(1, layer.rows + 1)):
        small = apply(made.program, store(name), {"layer": (c, r)})
        (after,) = [each for each in find_layers(small).layers if each.name == "layer"]
        change = composed(small, after) - weight
        if not float(change.abs().max()) > 0:
            assert (c, r) == (layer.columns, layer.rows)
        expected = sum(p * float((grad * change).sum()) ** 2 for p, grad in gradients(made)) / len(made.inputs) / 2
        assert found.loss(c, r) == pytest.approx(expected, rel=1e-8, abs=1e-14)
    assert found.importance_lost(1, 1) == axes["layer"].loss(1, 1)  # scores and order stay
