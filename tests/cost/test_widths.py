"""Sizes of labelled dims under removal, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kfe_fx.cost.widths import ONE, Product, Widths, product_of


def brute(layers: list[np.ndarray], gone: set[int]) -> int:
    return sum(not any(int(layer[i]) in gone for layer in layers) for i in range(len(layers[0])))


def test_products_multiply():
    assert Product(2, (1,)) * Product(3, (0,)) * 5 == Product(30, (0, 1))
    assert product_of([]) == ONE
    assert Product(3, (0, 1, 1)).at([2, 5]) == 3 * 2 * 5 * 5


def test_dims_with_the_same_units_are_one_width():
    widths = Widths(4)
    first = widths.product([np.array([0, 1, 2, 3])], 4)
    assert widths.product([np.array([3, 2, 1, 0])], 4) == first
    assert widths.product([np.array([0, 0, 1, 1])], 4) != first
    assert len(widths) == 2


def test_a_dim_without_units_is_a_constant():
    widths = Widths(4)
    assert widths.product([], 7) == Product(7)
    assert widths.product([np.full(7, -1)], 7) == Product(7)


@pytest.mark.parametrize("seed", range(20))
def test_sizes_equal_counting(seed: int):
    random = np.random.default_rng(seed)
    widths, all_layers = Widths(12), []
    for _ in range(5):
        length = int(random.integers(1, 9))
        layers = [random.integers(-1, 12, length) for _ in range(int(random.integers(1, 3)))]
        if max(layer.max() for layer in layers) >= 0 and widths.product(layers, length).widths == (len(all_layers),):
            all_layers.append(layers)
    gone = set(random.choice(12, 5, replace=False).tolist())
    sizes = widths.sizes(gone)
    assert sizes.tolist() == [brute(layers, gone) for layers in all_layers]
    assert sizes.tolist() == [widths.size(w, widths.mask(gone)) for w in range(len(widths))]
    assert widths.sizes(widths.mask(gone)).tolist() == sizes.tolist()


def test_two_layers_lose_an_index_once():
    # two heads of three positions: unit 0 is a head, unit 2 a position
    widths = Widths(5)
    width = widths.product([np.repeat([0, 1], 3), np.tile([2, 3, 4], 2)], 6)
    assert width.at(widths.sizes({0, 2}).tolist()) == 2
    assert width.at(widths.sizes({0}).tolist()) == 3


@pytest.mark.parametrize("layer", [np.tile([0, 1, -1], 2), np.repeat([0, 1, -1], 2)])
def test_a_batch_folded_into_a_dim_is_taken_out(layer: np.ndarray):
    widths = Widths(2)
    assert widths.product([layer], 3).at(widths.sizes({0}).tolist()) == 2
