from __future__ import annotations

import hashlib

import numpy as np
import pytest

from kfe_fx.data import glyphs as module
from kfe_fx.data.glyphs import CLASSES, FONTS, glyphs, held_out
from kfe_fx.errors import BadData


def test_shapes_types_and_scale():
    images, labels = glyphs(1200, 3)
    assert images.shape == (1200, 1, 32, 32)
    assert images.dtype == np.float32
    assert labels.shape == (1200,)
    assert labels.dtype == np.int64
    assert set(labels.tolist()) == set(range(36))
    assert abs(float(images.mean())) < 0.05
    assert abs(float(images.std()) - 1.0) < 0.05
    assert np.isfinite(images).all()


def test_the_same_seed_gives_the_same_images():
    first, again = glyphs(50, 5), glyphs(50, 5)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


def test_a_longer_set_begins_with_the_shorter_one():
    short, long = glyphs(30, 5), glyphs(1001, 5)
    assert np.array_equal(short[0], long[0][:30])
    assert np.array_equal(short[1], long[1][:30])
    # and the block that begins at 1000 is not the first one again
    assert not np.array_equal(long[0][1000], long[0][0])


def test_no_image_is_in_two_streams():
    streams = [glyphs(1000, 0)[0], glyphs(1000, 1)[0], held_out(1000)[0]]
    digests = [hashlib.sha256(image.tobytes()).digest() for images in streams for image in images]
    assert len(set(digests)) == len(digests)


def test_streams_differ_in_more_than_noise():
    # the same characters at other places: labels and even the blurred images are unrelated
    (a, a_labels), (b, b_labels) = glyphs(1000, 0), held_out(1000)
    assert abs(float((a_labels == b_labels).mean()) - 1 / 36) < 0.02
    blurred = [x.reshape(1000, 8, 4, 8, 4).mean((2, 4)).reshape(1000, -1) for x in (a, b)]
    centred = [x - x.mean(0) for x in blurred]
    norms = [np.linalg.norm(x, axis=1) for x in centred]
    correlation = (centred[0] * centred[1]).sum(1) / (norms[0] * norms[1])
    assert abs(float(correlation.mean())) < 0.05


def test_every_character_is_drawn_in_every_font():
    masks = module._masks().reshape(len(FONTS), len(CLASSES), -1)
    ink = masks.sum(2)
    assert float(ink.min()) > 50
    # 0 and O are close, but no two characters of a font are the same picture
    for font in masks:
        assert len({character.tobytes() for character in font}) == len(CLASSES)
    # a border of zeros, which the warp reads for all that lies outside
    square = masks.reshape(len(FONTS), len(CLASSES), module.MASK, module.MASK)
    assert float(square[:, :, [0, -1], :].max()) == 0.0
    assert float(square[:, :, :, [0, -1]].max()) == 0.0


def test_an_unturned_character_is_where_it_should_be():
    # identity map at twice the resolution of nothing: one pixel of the image is one of the mask
    rng = np.random.default_rng(0)
    zeros = np.zeros(1)
    image = module._warp(np.array([10]), rng, module.MASK, np.ones((1, 2)), zeros, zeros, np.zeros((1, 2)))[0]
    font = np.random.default_rng(0).integers(len(FONTS), size=1)[0]
    expected = module._masks().reshape(len(FONTS), len(CLASSES), module.MASK, module.MASK)[font, 10]
    np.testing.assert_allclose(image, expected, atol=2e-5)  # coordinates are float32


def test_size():
    assert glyphs(3, 0, size=16)[0].shape == (3, 1, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((0, 0), "0 images"), ((5, -1), "seed -1"), ((5, 0, 4), "4 pixels")],
)
def test_bad_arguments(arguments: tuple[int, ...], text: str):
    with pytest.raises(BadData, match=text):
        glyphs(*arguments)
