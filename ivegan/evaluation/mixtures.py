"""Measures of points against a mixture of Gaussians, ``ring`` or ``grid``, as pure functions."""

import numpy as np

from ivegan.config import PROTOCOLS, Protocol
from ivegan.errors import UserError
from ivegan.order import modes
from ivegan.shapes import Float, Int

HIGH_QUALITY_STDS = 3.0
# A spread is measured over points at most this many stds from their mode: all of a Gaussian up to
# twice too wide, and hardly anything of the bridges that a continuous G draws between modes.
_SPREAD_STDS = 6.0


def nearest_modes(
    points: Float[np.ndarray, "n 2"], dataset: str, protocol: Protocol = PROTOCOLS["pacgan"]
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return each point's nearest mode, and the distance to it in standard deviations."""
    means, std = modes(dataset, protocol)
    distances = np.linalg.norm(points[:, None, :] - means[None], axis=2) / std
    nearest = distances.argmin(axis=1)
    return nearest, distances[np.arange(len(points)), nearest]


def mixture(
    points: Float[np.ndarray, "n 2"], dataset: str, protocol: Protocol = PROTOCOLS["pacgan"]
) -> dict[str, float]:
    """Return how well points cover ``ring`` or ``grid``, each number free of the data's scale.

    ``modes``: modes that are nearest to at least one high-quality point.
    ``high_quality``: share of points within 3 stds of a mode; a perfect sampler has 0.98889 in a
    disc, and more than that is too narrow rather than better.
    ``reverse_kl``: KL divergence, in nats, of the modes' shares of points from equal shares; ln K,
    the worst, where there are no such points.
    ``reverse_kl_all``: the same over all points, whatever the protocol.
    ``std_ratio``: std of one mode's points over the data's, mean over modes, with its extremes.
    """
    if not np.isfinite(points).all():
        raise UserError("Some points are not finite: the networks of this checkpoint diverged.")
    means, std = modes(dataset, protocol)
    nearest, distance = nearest_modes(points, dataset, protocol)
    offsets = np.abs(points - means[nearest]) / std
    good = (offsets.max(axis=1) if protocol.box else distance) <= HIGH_QUALITY_STDS
    counts = np.bincount(nearest[good], minlength=len(means))
    every = np.bincount(nearest, minlength=len(means))
    ratios = _std_ratios(points, nearest, distance, std) or [0.0]
    return {
        "modes": float(np.count_nonzero(counts)),
        "high_quality": float(good.mean()),
        "reverse_kl": _kl_from_uniform(every if protocol.all_points else counts),
        "reverse_kl_all": _kl_from_uniform(every),
        "std_ratio": float(np.mean(ratios)),
        "std_ratio_min": float(np.min(ratios)),
        "std_ratio_max": float(np.max(ratios)),
    }


def reconstructed_points(
    x: Float[np.ndarray, "n 2"],
    x_hat: Float[np.ndarray, "k n 2"],
    dataset: str,
    protocol: Protocol = PROTOCOLS["pacgan"],
    noise_std: float = 0.5**0.5,
) -> dict[str, float]:
    """Return how well G(z', E(x)) follows x: to its mode, and from there with T's spread.

    ``right_mode``: share of variations whose nearest mode is that of x.
    ``residual_std_ratio``: std of G(z', E(x)) - x over that of T, sigma / sqrt(2) unless
    ``noise_std`` says otherwise, for variations in the right mode; 1 is D's optimum.
    ``residual_p``: p-value of a Kolmogorov-Smirnov test that these are distributed as T's shifts.
    Without T there are no such two.
    """
    from scipy.stats import kstest

    _, std = modes(dataset, protocol)
    target = std * noise_std
    wanted, _ = nearest_modes(x, dataset)
    found = np.stack([nearest_modes(points, dataset)[0] for points in x_hat])
    right = found == wanted
    residuals = (x_hat - x)[right]
    if not noise_std:
        return {"right_mode": float(right.mean())}
    if len(residuals) < 2:
        return {"right_mode": float(right.mean()), "residual_std_ratio": 0.0, "residual_p": 0.0}
    return {
        "right_mode": float(right.mean()),
        # About zero, not about their mean: a constant offset is an error too.
        "residual_std_ratio": float(np.sqrt(np.square(residuals).mean()) / target),
        "residual_p": float(kstest(residuals.ravel() / target, "norm").pvalue),
    }


def _std_ratios(
    points: np.ndarray, nearest: np.ndarray, distance: np.ndarray, std: float
) -> list[float]:
    """Return the std ratio of every mode that has two points or more."""
    ratios = []
    for mode in np.unique(nearest):
        own = points[nearest == mode]
        close = own[distance[nearest == mode] <= _SPREAD_STDS]
        own = close if len(close) > 1 else own  # nothing is near: the spread of the rest
        if len(own) > 1:
            ratios.append(float(np.sqrt(own.var(axis=0, ddof=1).mean()) / std))
    return ratios


def _kl_from_uniform(counts: np.ndarray) -> float:
    """Return the KL divergence of a histogram from the uniform one, ln K minus its entropy."""
    if not counts.sum():
        return float(np.log(len(counts)))
    p = counts[counts > 0] / counts.sum()
    return float(np.log(len(counts)) + (p * np.log(p)).sum())
