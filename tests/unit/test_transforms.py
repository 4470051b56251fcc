"""T moves and colours images as the preset says, and nothing else."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ivegan import order
from ivegan.config import Transform, preset
from ivegan.transforms import to_float, to_uint8, transform

NEUTRAL = torch.full((1, order.NUM_TRANSFORM_DRAWS), 0.5)


def draws_at(**values):
    """Return draws that are neutral but for the named places."""
    names = ["dx", "dy", "angle", "flip", "brightness", "contrast", "hue"]
    draws = NEUTRAL.clone()
    for name, value in values.items():
        draws[0, names.index(name)] = value
    return draws


def test_pixels_survive_the_way_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)


def test_neutral_draws_leave_the_image_alone():
    x = torch.rand(1, 3, 16, 16)
    t = Transform(shift=4.0, rotate=20.0, brightness=0.2, contrast=0.2, hue=0.1)
    torch.testing.assert_close(transform(x, NEUTRAL, t), x, rtol=0, atol=2e-5)


def test_the_largest_shift_is_the_stated_number_of_pixels():
    x = torch.rand(1, 1, 32, 32)
    moved = transform(x, draws_at(dx=0.0), Transform(shift=4.0))  # 0 is the left end of the range
    torch.testing.assert_close(moved[..., 4:], x[..., :-4], rtol=0, atol=1e-5)
    assert moved[..., :4].max() < 1e-5  # black comes in


def test_rotation_is_that_of_an_independent_library():
    x = torch.zeros(1, 1, 33, 33)
    x[..., 8:25, 12:21] = 1
    x = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    turned = transform(x, draws_at(angle=1.0), Transform(rotate=20.0))
    image = Image.fromarray(x[0, 0].numpy()).rotate(20, Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.asarray(image).copy())
    assert (turned[0, 0] - expected).abs().mean() < 0.01
    assert (x[0, 0] - expected).abs().mean() > 0.03  # the test can tell them apart


def test_flip_mirrors_left_and_right_for_half_of_the_draws():
    x = torch.rand(1, 3, 16, 16)
    t = Transform(flip=True)
    torch.testing.assert_close(transform(x, draws_at(flip=0.2), t), x.flip(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(transform(x, draws_at(flip=0.8), t), x, rtol=0, atol=1e-5)


def test_brightness_scales_all_values_and_contrast_keeps_the_mean_grey():
    x = 0.4 + 0.2 * torch.rand(1, 3, 8, 8)
    lit = transform(x, draws_at(brightness=1.0), Transform(brightness=0.2))
    torch.testing.assert_close(lit, 1.2 * x, rtol=1e-5, atol=1e-6)
    x = x[:, :1]
    harder = transform(x, draws_at(contrast=1.0), Transform(contrast=0.3))
    torch.testing.assert_close(harder.mean(), x.mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(harder.std(), 1.3 * x.std(), rtol=1e-4, atol=1e-5)


def test_hue_leaves_grey_alone_and_turns_colours():
    grey = torch.full((1, 3, 4, 4), 0.5)
    t = Transform(hue=0.5)
    torch.testing.assert_close(transform(grey, draws_at(hue=0.9), t), grey, rtol=0, atol=2e-3)
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 0.6
    assert (transform(red, draws_at(hue=0.9), t) - red).abs().max() > 0.1


def test_values_stay_in_range():
    x = torch.rand(16, 3, 16, 16)
    y = transform(x, torch.rand(16, 7), preset("celeba").transform)
    assert y.min() >= 0
    assert y.max() <= 1


def test_points_move_by_the_stated_standard_deviation():
    t = preset("ring").transform
    normal = 0.005 * torch.randn(20_000, 2)
    moved = transform(torch.zeros(20_000, 2), normal, t)
    assert moved.std().item() == pytest.approx(0.005 / math.sqrt(2), rel=0.03)
