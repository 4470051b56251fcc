"""Which sample stands where, and every random draw, as pure functions of (seed, step, position).

A step works on one global batch, whose positions are counted through the whole run. Rank r of w
takes the r-th of w equal slices. Nothing here depends on the number of ranks, so 1, 2 or 4 workers
see the same data in the same order with the same draws, and a resumed run needs no saved random
state: it asks again for the same step.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ivegan.config import GRID_SPACING, GRID_STD, RING_RADIUS, RING_STD, Config
from ivegan.shapes import Float

# What a stream of random numbers is for: no two purposes ever share one.
_WEIGHTS, _ORDER, _DRAWS, _POINTS = range(4)

NUM_TRANSFORM_DRAWS = 7  # shift x, shift y, angle, flip, brightness, contrast, hue


class Draws(NamedTuple):
    """The random numbers of one step for one rank's n samples."""

    noise: Tensor
    """z' of the variations, standard normal, (n, noise_dim)."""
    z_prior: Tensor
    """z of the prior samples, uniform on (-1, 1), the range of E's Tanh; (n, z_dim)."""
    noise_prior: Tensor
    """z' of the prior samples, standard normal, (n, noise_dim)."""
    transform: Tensor
    """What T is made of: (n, 7) uniform on [0, 1) for images, (n, 2) standard normal for points."""
    condition: Tensor
    """The same for a second T, used on x itself where ``transform.condition`` asks for it."""

    def to(self, device: torch.device) -> "Draws":
        """Return the draws on a device."""
        return Draws(*(part.to(device, non_blocking=True) for part in self))


def weights_seed(seed: int, network: int) -> int:
    """Return the seed of one network's initial weights."""
    return _entropy(seed, _WEIGHTS, network)


def batch_indices(
    seed: int, num_samples: int, batch_size: int, step: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Return the sample indices of a rank's slice of one global batch: int64, (batch / world,).

    Epoch after epoch, each a permutation of all samples, laid end to end and cut into batches; a
    batch may therefore straddle two epochs, and every sample is seen once per epoch.
    """
    positions = step * batch_size + _slice(batch_size, rank, world_size)
    epochs, offsets = np.divmod(positions, num_samples)
    out = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        out[here] = _permutation(seed, int(epoch), num_samples)[offsets[here]]
    return out


def draw(config: Config, step: int, rank: int = 0, world_size: int = 1) -> Draws:
    """Return a rank's slice of the global batch's random numbers for one step."""
    n, model = config.batch_size, config.model
    generator = torch.Generator().manual_seed(_entropy(config.seed, _DRAWS, step))
    if config.is_points:
        transform, condition = torch.randn(2, n, 2, generator=generator)
    else:
        transform, condition = torch.rand(2, n, NUM_TRANSFORM_DRAWS, generator=generator)
    everything = Draws(
        noise=torch.randn(n, model.noise_dim, generator=generator),
        z_prior=2 * torch.rand(n, model.z_dim, generator=generator) - 1,
        noise_prior=torch.randn(n, model.noise_dim, generator=generator),
        transform=transform,
        condition=condition,
    )
    here = _slice(n, rank, world_size)
    return Draws(*(part[here[0] : here[-1] + 1] for part in everything))


def modes(dataset: str) -> tuple[Float[np.ndarray, "k 2"], float]:
    """Return the means of the Gaussians of ``ring`` or ``grid``, and their standard deviation."""
    if dataset == "ring":
        angle = np.arange(8) * (2 * np.pi / 8)  # eight distinct means: the end point is the first
        return RING_RADIUS * np.stack((np.cos(angle), np.sin(angle)), axis=1), RING_STD
    side = GRID_SPACING * np.arange(-2, 3)
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), GRID_STD


def points(config: Config, step: int, rank: int = 0, world_size: int = 1) -> Float[Tensor, "n 2"]:
    """Return a rank's slice of a fresh global batch of ``ring`` or ``grid`` points."""
    means, std = modes(config.dataset)
    generator = torch.Generator().manual_seed(_entropy(config.seed, _POINTS, step))
    which = torch.randint(len(means), (config.batch_size,), generator=generator)
    spread = torch.randn(config.batch_size, 2, generator=generator)
    everything = torch.from_numpy(means.astype(np.float32))[which] + std * spread
    here = _slice(config.batch_size, rank, world_size)
    return everything[here[0] : here[-1] + 1]


def _slice(batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Return the places in the global batch that belong to a rank."""
    assert batch_size % (2 * world_size) == 0, "each rank takes an equal, even share"
    share = batch_size // world_size
    return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)


def _entropy(*words: int) -> int:
    """Return 64 well-mixed bits that depend on all the words."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(num_samples)
