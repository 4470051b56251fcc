"""The transformation between two images, by search, and how much of it z' explains."""

import itertools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ivegan.config import Transform
from ivegan.order import NUM_TRANSFORM_DRAWS
from ivegan.shapes import Float, UInt8
from ivegan.transforms import to_float, transform

_SIDE = 32  # larger images are averaged down to this many pixels
_COARSE_STEP = 0.25  # of the first grid, as a share of T's range
_REFINEMENTS = 3  # each halves the step


def register(
    x: UInt8[np.ndarray, "n c h w"], x_hat: UInt8[np.ndarray, "n c h w"], t: Transform
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, " n"]]:
    """Return the shift and rotation that bring each x nearest to its x_hat, and the error left.

    A search over T's own range, coarse to fine, by squared error. Where T mirrors, the mirror
    image of x competes with x.

    Args:
        x: originals.
        x_hat: as many images, as G(z', E(x)) of each.
        t: the transformations; their colours are left out.

    Returns:
        (dx, dy, theta), each as a share of T's range, and the mean squared error of a pixel.
    """
    source, target = _small(x), _small(x_hat)
    shift = t.shift * source.shape[-1] / x.shape[-1]
    move = replace(t, shift=shift, flip=False, brightness=0.0, contrast=0.0, hue=0.0)
    places, errors = _search(source, target, move)
    if t.flip:
        mirrored, mirrored_errors = _search(source.flip(-1), target, move)
        better = mirrored_errors < errors
        places = torch.where(better[:, None], mirrored, places)
        errors = torch.minimum(errors, mirrored_errors)
    return places.numpy(), errors.numpy()


def _search(source: Tensor, target: Tensor, t: Transform) -> tuple[Tensor, Tensor]:
    """Return the best (dx, dy, theta) of each image, and its error."""
    steps = torch.arange(-1, 1 + 1e-6, _COARSE_STEP).tolist()
    grid = itertools.product(*(steps if size else [0.0] for size in (t.shift, t.shift, t.rotate)))
    best = torch.zeros(len(source), 3)
    errors = _error(source, target, best, t)
    step = _COARSE_STEP
    for _ in range(1 + _REFINEMENTS):
        centre = best
        for offset in grid:
            places = centre + torch.tensor(offset)
            found = _error(source, target, places, t)
            best = torch.where((found < errors)[:, None], places, best)
            errors = torch.minimum(found, errors)
        step /= 2
        grid = itertools.product((-step, 0.0, step), repeat=3)
    return best, errors


def _error(source: Tensor, target: Tensor, places: Tensor, t: Transform) -> Tensor:
    draws = torch.full((len(source), NUM_TRANSFORM_DRAWS), 0.5)
    draws[:, :3] = (places + 1) / 2
    return (transform(source, draws, t) - target).square().flatten(1).mean(1)


def _small(images: np.ndarray) -> Tensor:
    x = to_float(torch.from_numpy(np.array(images)))
    return x if x.shape[-1] <= _SIDE else adaptive_avg_pool2d(x, _SIDE)


def explained_variance(
    noise: Float[np.ndarray, "n d"], places: Float[np.ndarray, "n k"]
) -> Float[np.ndarray, " k"]:
    """Return R² of each column of ``places``, predicted from z' for images not fitted on.

    Ridge regression, cross-validated in five folds; each row is of another image. 0 where a
    column does not vary.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold, cross_val_predict

    folds = KFold(5, shuffle=True, random_state=0)
    predicted = cross_val_predict(RidgeCV(np.logspace(-3, 3, 7)), noise, places, cv=folds)
    rest = np.square(places - predicted).sum(axis=0)
    total = np.square(places - places.mean(axis=0)).sum(axis=0)
    return np.where(total > 0, 1 - rest / np.where(total > 0, total, 1), 0.0)
