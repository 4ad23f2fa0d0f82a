"""The embedded image source: drawn as stated, masks that fit, fractals that are fractals."""

import numpy as np
import pytest

from tasks.sources import shapes

SEEDS = ((0, "train"), (1, "train"), (0, "val"))


def test_images_are_balanced_and_follow_the_seed():
    x, y, names = shapes.load(60, 32, seed=0)
    assert x.shape == (60, 3, 32, 32) and x.dtype == np.float32 and y.dtype == np.int64
    assert 0 <= x.min() and x.max() <= 1
    assert np.bincount(y).tolist() == [3] * 20 and len(names) == 20
    again, other, held = (shapes.load(60, 32, seed=s, split=p)[0] for s, p in SEEDS)
    assert np.array_equal(x, again)
    assert not np.array_equal(x, other) and not np.array_equal(x, held)


def test_masks_are_where_the_object_is():
    x, mask, _ = shapes.load(200, 48, masks=True)
    same, y, _ = shapes.load(200, 48)
    assert np.array_equal(x, same) and mask.shape == (200, 1, 48, 48)
    assert set(np.unique(mask)) == {0.0, 1.0}
    cover = mask.mean(axis=(1, 2, 3))
    assert (cover > 0.02).all() and (cover < 0.7).all()
    # the object's colours are not the background's: the two parts differ in some channel
    inside = (x * mask).sum(axis=(2, 3)) / mask.sum(axis=(2, 3))
    outside = (x * (1 - mask)).sum(axis=(2, 3)) / (1 - mask).sum(axis=(2, 3))
    assert (np.abs(inside - outside).max(axis=1) > 0.05).mean() > 0.9


def outline(name, size=200):
    axis = (2 * np.arange(size) + 1) / size * 2 - 2
    number = np.array([list(shapes.OUTLINES).index(name)])
    u, v = np.broadcast_to(axis[None, None], (1, size, size)), axis[None, :, None]
    v = np.broadcast_to(v, u.shape)
    mask = shapes.shape_mask(number, u, v, np.full((1, 1, 1), size / 4))[0]
    return mask, mask.sum() * (4 / size) ** 2


@pytest.mark.parametrize(("name", "m", "e"), [(k, *v) for k, v in shapes.OUTLINES.items()])
def test_outlines_have_the_area_of_their_equation(name, m, e):
    """r = 1 + e cos(m phi) encloses pi (1 + e^2 / 2); the ring lacks its hole."""
    _, area = outline(name)
    want = np.pi * (1 - 0.55**2) if name == "ring" else np.pi * (1 + (e**2 / 2 if m else 0))
    assert area == pytest.approx(want, rel=0.02)


def test_a_square_has_four_corners():
    mask, _ = outline("square")
    turned = np.rot90(mask)
    assert np.abs(mask - turned).mean() < 0.01
    assert mask[:, ::-1] == pytest.approx(mask, abs=0.5)


@pytest.mark.parametrize("name", shapes.TEXTURES)
def test_textures_fill_0_to_1_and_differ_in_phase(name):
    axis = np.linspace(-1, 1, 64)
    u, v = (
        np.broadcast_to(axis[None, None], (4, 64, 64)),
        np.broadcast_to(axis[:, None], (4, 64, 64)),
    )
    number = np.full(4, shapes.TEXTURES.index(name))
    value = shapes.texture_values(number, u, v, np.random.default_rng(0))
    assert value.min() >= 0 and value.max() <= 1 and (value.std(axis=(1, 2)) > 0.1).all()
    assert not np.array_equal(value[0], value[1])


def test_fractal_codes_contract_and_their_probabilities_sum_to_1():
    A, b, cumulative = shapes.fractal_codes()
    assert A.shape == (shapes.FRACTALS, 4, 2, 2) and b.shape == (shapes.FRACTALS, 4, 2)
    used = np.diff(cumulative, axis=1, prepend=0) > 0
    assert (np.linalg.norm(A, 2, axis=(2, 3))[used] < 1).all()
    np.testing.assert_allclose(cumulative[:, -1], 1)
    assert ((used.sum(axis=1) >= 2) & (used.sum(axis=1) <= 4)).all()


def test_specimens_of_a_fractal_are_alike_and_other_fractals_are_not():
    rng = np.random.default_rng(0)
    number = np.repeat(np.arange(20), 6)
    masks = shapes.fractal_mask(number, 16, rng).reshape(len(number), -1)
    masks = masks - masks.mean(axis=0)
    close = masks @ masks.T / np.outer(*[np.linalg.norm(masks, axis=1)] * 2)
    np.fill_diagonal(close, -1)
    assert (number[close.argmax(axis=1)] == number).mean() > 0.6  # by chance: 0.04
