"""Ridge fits of a layer against the normal equations, and which method is taken."""

from __future__ import annotations

import torch

from kfe_fx.repair.fit import KEPT, LEAST_SQUARES, MEAN, Layer, choose


def pieces(
    seed: int, count: int, rows: int, inputs: int, weight: torch.Tensor, constant: torch.Tensor, noise: float = 0.0
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        read = torch.randn(len(weight), rows, inputs, dtype=torch.float64, generator=generator)
        given = read @ weight.mT + constant.unsqueeze(1)
        made.append((read, given + noise * torch.randn(given.shape, dtype=torch.float64, generator=generator)))
    return made


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_weights_that_made_the_outputs_are_found_again():
    weight, constant = drawn(3, 4, 5), drawn(3, 4)
    now = Layer(KEPT, drawn(3, 4, 5, seed=2), drawn(3, 4, seed=3))
    choice = choose(now, {}, pieces(0, 8, 200, 5, weight, constant), 2, constant=True)
    assert choice.taken.method == LEAST_SQUARES
    # the least ridge of 1e-4 is all that is between
    torch.testing.assert_close(choice.taken.weight, weight, rtol=0, atol=1e-3)
    torch.testing.assert_close(choice.taken.constant, constant, rtol=0, atol=1e-3)


def test_a_fit_solves_the_normal_equations_of_its_ridge():
    weight, constant = drawn(2, 3, 4), torch.zeros(2, 3, dtype=torch.float64)
    now = Layer(KEPT, drawn(2, 3, 4, seed=2), constant)
    given = pieces(0, 6, 50, 4, weight, constant, noise=0.5)
    taken = choose(now, {}, given, 1, constant=False).taken
    read, wanted = (torch.cat([piece[side] for piece in given[:-1]], 1) for side in (0, 1))
    gram = read.mT @ read / read.shape[1]
    slope = ((wanted - read @ taken.weight.mT).mT @ read) / read.shape[1]
    step = taken.weight - now.weight
    level = gram.diagonal(dim1=1, dim2=2).mean(1)
    # the gradient of the fit is that of rho |W' - W|^2 for one of the ridges
    ratios = (slope / (step * level[:, None, None])).flatten()
    assert ratios.std() < 1e-9
    assert min(abs(float(ratios.mean()) - ridge) for ridge in (1e-4, 1e-2, 1e-1)) < 1e-9


def test_without_a_place_for_a_constant_none_is_made():
    weight, constant = drawn(1, 2, 3), 5 * torch.ones(1, 2, dtype=torch.float64)
    now = Layer(KEPT, drawn(1, 2, 3, seed=2), torch.zeros(1, 2, dtype=torch.float64))
    choice = choose(now, {}, pieces(0, 6, 50, 3, weight, constant), 1, constant=False)
    assert MEAN not in choice.errors
    assert not choice.taken.constant.any()


def test_the_mean_is_taken_where_the_inputs_say_nothing():
    weight = torch.zeros(1, 2, 3, dtype=torch.float64)
    noisy = pieces(0, 4, 6, 3, weight, 4 * torch.ones(1, 2, dtype=torch.float64), noise=1.0)
    choice = choose(Layer(KEPT, weight, torch.zeros(1, 2, dtype=torch.float64)), {}, noisy, 1, constant=True)
    assert choice.errors[MEAN] < 0.5 * choice.errors[KEPT]
    assert choice.taken.constant.mean() > 2


def test_weights_that_nothing_betters_stay():
    weight, constant = drawn(2, 3, 4), drawn(2, 3)
    now = Layer(KEPT, weight, constant)
    choice = choose(
        now, {"other": drawn(2, 3, 4, seed=9)}, pieces(0, 6, 30, 4, weight, constant, 0.3), 2, constant=True
    )
    assert choice.taken is now
    assert choice.errors["other"] > choice.errors[KEPT]


def test_another_method_is_taken_where_it_is_best():
    weight, constant = drawn(1, 3, 40), drawn(1, 3)
    now = Layer(KEPT, torch.zeros_like(weight), torch.zeros_like(constant))
    # fewer rows than inputs: the fit cannot find what the other method knows
    choice = choose(now, {"known": weight}, pieces(0, 3, 10, 40, weight, constant), 1, constant=True)
    assert choice.taken.method == "known"
    torch.testing.assert_close(choice.taken.constant, constant, rtol=1e-10, atol=1e-10)


def test_a_fit_that_is_not_finite_is_never_taken():
    weight, constant = drawn(1, 2, 3), drawn(1, 2)
    now = Layer(KEPT, weight, constant)
    bad = torch.full_like(weight, float("nan"))
    choice = choose(now, {"bad": bad}, pieces(0, 4, 20, 3, weight, constant, 0.1), 1, constant=True)
    assert choice.errors["bad"] == float("inf")
    assert choice.taken.method != "bad"
    assert torch.isfinite(choice.taken.weight).all()
