from dataclasses import replace

import numpy as np
import pytest
import torch

from ivegan.config import Transform
from ivegan.evaluation.registration import explained_variance, register
from ivegan.transforms import to_float, to_uint8, transform

MNIST = Transform(shift=4.0, rotate=20.0)
FACES = Transform(shift=12.0, rotate=15.0, flip=True, brightness=0.1, border="reflection")


def strokes(count: int, side: int = 32, channels: int = 1) -> np.ndarray:
    """Return images of a few thick random lines, of which no two are alike."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    images = np.zeros((count, side, side))
    for image in images:
        for _ in range(3):
            (a, b), angle = rng.uniform(0.35, 0.65, 2), rng.uniform(0, np.pi)
            across = (x - a) * np.sin(angle) - (y - b) * np.cos(angle)
            along = (x - a) * np.cos(angle) + (y - b) * np.sin(angle)
            image += np.exp(-((across / 0.05) ** 2) - (along / 0.2) ** 2)
    stored = (255 * images.clip(0, 1)).astype(np.uint8)
    return np.repeat(stored[:, None], channels, axis=1)


def moved(images: np.ndarray, draws: torch.Tensor, t: Transform) -> np.ndarray:
    return to_uint8(transform(to_float(torch.from_numpy(images)), draws, t)).numpy()


@pytest.mark.parametrize(("t", "side", "channels"), [(MNIST, 32, 1), (FACES, 128, 3)])
def test_a_transformation_is_found_again(t, side, channels):
    x = strokes(8, side, channels)
    draws = torch.rand(8, 7, generator=torch.Generator().manual_seed(1))
    draws[:, 3] = 0.9  # not mirrored
    places, errors = register(x, moved(x, draws, replace(t, brightness=0.0)), t)
    wanted = (2 * draws[:, :3] - 1).numpy()
    # A sixteenth of the range: a quarter of a pixel and a little over a degree.
    assert np.abs(places - wanted).mean() < 0.06
    assert np.median(errors) < 1e-3
    still, other = register(x, x, t), register(np.roll(x, 1, axis=0), x, t)
    assert not still[0].any()
    assert not still[1].any()
    assert other[1].mean() > 20 * errors.mean()


def test_a_mirrored_image_is_recognised_only_where_t_mirrors():
    x = strokes(8)
    mirrored = np.ascontiguousarray(x[..., ::-1])
    assert register(x, mirrored, replace(MNIST, flip=True))[1].max() == 0
    assert register(x, mirrored, MNIST)[1].mean() > 0.001


def test_explained_variance_is_one_for_what_z_prime_sets_and_zero_for_the_rest():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((300, 4))
    places = np.stack(
        (noise @ [1, 2, 0, 0], rng.standard_normal(300), np.zeros(300), noise[:, 3]), axis=1
    )
    places[:, 3] += rng.standard_normal(300)  # half signal, half noise
    scores = explained_variance(noise, places)
    assert scores[0] == pytest.approx(1, abs=0.01)
    assert scores[1] < 0.05
    assert scores[2] == 0
    assert scores[3] == pytest.approx(0.5, abs=0.1)
