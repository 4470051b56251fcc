"""Which sample stands where, and every random draw, as pure functions of (seed, step, position).

A step works on one global batch, whose positions are counted through the whole run. Rank r of w
takes the r-th of w equal slices. Nothing here depends on the number of ranks, so 1, 2 or 4 workers
see the same data in the same order with the same draws, and a resumed run needs no saved random
state: it asks again for the same step.

Data that fit on a node are read in any order, so an epoch is one permutation of all samples
(``batch_indices``). Data that fit nowhere are read shard after shard: a global batch is laid out in
lanes of equal width, each fed from shards of its own (``lane_pieces``).
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ivegan.config import GRID_SPACING, PROTOCOLS, RING_RADIUS, Config, Protocol
from ivegan.shapes import Float

# What a stream of random numbers is for: no two purposes ever share one.
_WEIGHTS, _ORDER, _DRAWS, _POINTS, _SHARDS, _LANES = range(6)

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
    """What T is made of: (n, 7) uniform on [0, 1) of images, (n, 2) offsets in a mode of points."""
    condition: Tensor
    """The same for a second T, of x itself, where ``transform.condition`` asks for it."""
    encoder: Tensor
    """The same for a third T, of E's input, where ``transform.encoder`` asks for it."""

    def to(self, device: torch.device) -> "Draws":
        """Return the draws on a device."""
        return Draws(*(draws.to(device, non_blocking=True) for draws in self))


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
        places = epochs == epoch
        out[places] = _shuffled(seed, _ORDER, int(epoch), num_samples)[offsets[places]]
    return out


class Piece(NamedTuple):
    """What a lane reads of one shard."""

    shard: int
    """The shard's place among those of the split."""
    samples: np.ndarray
    """Places in the shard, in the order in which they are used; int64."""


def num_lanes(num_shards: int, batch_size: int) -> int:
    """Return how many lanes a streamed global batch has: a power of two.

    A node holds two shards of each of its lanes in memory, which is why there are not more; large
    batches have more lanes, because they are cut into more ranks. Every lane takes an even number
    of samples of a batch, because a sample's neighbour is half of its mismatched pair.
    """
    most = min(num_shards, max(8, batch_size // 32))
    lanes = 1
    while lanes * 2 <= most and batch_size % (lanes * 4) == 0:
        lanes *= 2
    return lanes


def lane_pieces(
    seed: int, shard_sizes: Sequence[int], lane: int, lanes: int, skip: int = 0
) -> Iterator[Piece]:
    """Yield what a lane reads, indefinitely, from its sample number ``skip`` on.

    All shards, permuted anew for each epoch and laid end to end, are dealt to the lanes in turn:
    each shard is read by one lane, once per epoch, and no lane ever falls behind by more than a
    shard. Within a shard the samples are permuted anew each time.
    """
    num_shards, turn = len(shard_sizes), lane
    while True:
        epoch, place = divmod(turn, num_shards)
        shard = int(_shuffled(seed, _SHARDS, epoch, num_shards)[place])
        size = shard_sizes[shard]
        if skip < size:
            samples = np.random.default_rng((seed, _LANES, turn)).permutation(size)
            yield Piece(shard, samples[skip:])
        skip = max(0, skip - size)
        turn += lanes


def draw(config: Config, step: int, rank: int = 0, world_size: int = 1) -> Draws:
    """Return a rank's slice of the global batch's random numbers for one step."""
    n, model = config.batch_size, config.model
    generator = torch.Generator().manual_seed(_entropy(config.seed, _DRAWS, step))
    random, size = (torch.randn, 2) if config.is_points else (torch.rand, NUM_TRANSFORM_DRAWS)
    # Offsets of points are as wide as those of the data from their modes.
    scale = modes(config.dataset, PROTOCOLS[config.protocol])[1] if config.is_points else 1.0
    transform, condition = scale * random(2, n, size, generator=generator)
    batch = Draws(
        noise=torch.randn(n, model.noise_dim, generator=generator),
        z_prior=prior(n, model.z_dim, generator),
        noise_prior=torch.randn(n, model.noise_dim, generator=generator),
        transform=transform,
        condition=condition,
        encoder=scale * random(n, size, generator=generator),
    )
    ours = _slice(n, rank, world_size)
    return Draws(*(draws[ours[0] : ours[-1] + 1] for draws in batch))


def prior(count: int, z_dim: int, generator: torch.Generator) -> Float[Tensor, "n z"]:
    """Return latents from the prior, uniform on (-1, 1), the range of E's Tanh (Figs. 3 and 7)."""
    return 2 * torch.rand(count, z_dim, generator=generator) - 1


def modes(
    dataset: str, protocol: Protocol = PROTOCOLS["pacgan"]
) -> tuple[Float[np.ndarray, "k 2"], float]:
    """Return the means of the Gaussians of ``ring`` or ``grid``, and their standard deviation."""
    if dataset == "ring":
        angle = np.arange(8) * (2 * np.pi / 8)  # eight distinct means: the end point is the first
        return RING_RADIUS * np.stack(
            (np.cos(angle), np.sin(angle)), axis=1
        ), RING_RADIUS * protocol.ring
    side = GRID_SPACING * np.arange(-2, 3)
    return np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2), GRID_SPACING * protocol.grid


def points(config: Config, step: int, rank: int = 0, world_size: int = 1) -> Float[Tensor, "n 2"]:
    """Return a rank's slice of a fresh global batch of ``ring`` or ``grid`` points."""
    generator = torch.Generator().manual_seed(_entropy(config.seed, _POINTS, step))
    batch = sample_points(config.dataset, config.batch_size, generator, PROTOCOLS[config.protocol])
    ours = _slice(config.batch_size, rank, world_size)
    return batch[ours[0] : ours[-1] + 1]


def sample_points(
    dataset: str,
    count: int,
    generator: torch.Generator,
    protocol: Protocol = PROTOCOLS["pacgan"],
) -> Float[Tensor, "n 2"]:
    """Return samples of the Gaussian mixture ``ring`` or ``grid``, in data units."""
    means, std = modes(dataset, protocol)
    components = torch.randint(len(means), (count,), generator=generator)
    offsets = torch.randn(count, 2, generator=generator)
    return torch.from_numpy(means.astype(np.float32))[components] + std * offsets


def _slice(batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """Return the places in the global batch that belong to a rank."""
    assert batch_size % (2 * world_size) == 0, "each rank takes an equal, even share"
    share = batch_size // world_size
    return np.arange(rank * share, (rank + 1) * share, dtype=np.int64)


def _entropy(*words: int) -> int:
    """Return 64 well-mixed bits that depend on all the words."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=8)
def _shuffled(seed: int, purpose: int, epoch: int, count: int) -> np.ndarray:
    """Return one epoch's permutation of samples or shards; asked for again at every step."""
    return np.random.default_rng((seed, purpose, epoch)).permutation(count)
