"""Data order and draws depend on seed, step and position, never on the number of ranks."""

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ivegan import order
from ivegan.config import override, preset


@pytest.mark.parametrize("num_samples", [5, 64, 97])
def test_every_sample_comes_once_per_epoch(num_samples):
    epochs, batch_size, seed = 3, 32, 7
    steps = -(-epochs * num_samples // batch_size)
    stream = np.concatenate(
        [order.batch_indices(seed, num_samples, batch_size, s) for s in range(steps)]
    )
    for epoch in range(epochs):
        part = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert sorted(part) == list(range(num_samples))
    epochs_differ = stream[:num_samples] != stream[num_samples : 2 * num_samples]
    assert epochs_differ.any()
    assert (stream[:batch_size] != order.batch_indices(8, num_samples, batch_size, 0)).any()


def test_draws_have_the_distributions_they_claim():
    draws = order.draw(override(preset("mnist"), {"batch_size": 20_000}), 0)
    assert draws.z_prior.abs().max() <= 1
    # Standard errors at 20,000 x z_dim samples are below .002; five of them are allowed.
    assert abs(draws.z_prior.square().mean().item() - 1 / 3) < 0.01
    assert abs(draws.noise.square().mean().item() - 1) < 0.03
    assert abs(draws.transform.mean().item() - 0.5) < 0.01


@pytest.mark.parametrize(
    ("dataset", "protocol", "std"),
    [("ring", "pacgan", 0.005), ("ring", "selfcond", 0.0025), ("grid", "metz", 0.01)],
)
def test_points_lie_around_their_means_and_split_over_ranks(dataset, protocol, std):
    config = override(preset(dataset), {"batch_size": 4096, "protocol": protocol})
    x = order.points(config, 9)
    means, _ = order.modes(dataset)
    residual = np.linalg.norm(x.numpy()[:, None] - means[None], axis=-1).min(1)
    assert residual.max() < 6 * std
    # E|r|² = 2 std²; the standard error at n = 4096 is 1.6 %.
    assert abs((residual**2).mean() / (2 * std**2) - 1) < 0.08
    parts = torch.cat([order.points(config, 9, r, 2) for r in range(2)])
    assert torch.equal(parts, x)
    # T's offsets are those of the data, and noise_std is 1/sqrt 2: Eq. 4.
    assert float(order.draw(config, 9).transform.std()) == pytest.approx(std, rel=0.04)


SHARD_SIZES = ([5], [7, 7, 7, 2], [10, 9, 8, 1, 5, 5, 5, 5, 5, 2, 1])


@pytest.mark.parametrize(
    ("sizes", "lanes"),
    [(sizes, lanes) for sizes in SHARD_SIZES for lanes in (1, 2, 4) if lanes <= len(sizes)],
    ids=str,
)
def test_lanes_together_read_every_sample_once_per_epoch(sizes, lanes):
    seed, epochs = 7, 4  # so many turns that the lanes come out even
    turns = len(sizes) * epochs
    seen = Counter()
    order_of_shards = [0] * turns
    for lane in range(lanes):
        pieces = order.lane_pieces(seed, sizes, lane, lanes)
        for turn in range(lane, turns, lanes):
            piece = next(pieces)
            order_of_shards[turn] = piece.shard
            seen.update((piece.shard, int(place)) for place in piece.samples)
    assert seen == {(s, p): epochs for s, size in enumerate(sizes) for p in range(size)}
    for epoch in range(epochs):
        part = order_of_shards[epoch * len(sizes) : (epoch + 1) * len(sizes)]
        assert sorted(part) == list(range(len(sizes)))


def first_samples(pieces: Iterator[order.Piece], count: int) -> list[tuple[int, int]]:
    flat = ((piece.shard, int(place)) for piece in pieces for place in piece.samples)
    return list(itertools.islice(flat, count))


def test_lanes_differ_from_each_other_and_from_epoch_to_epoch():
    one, other = (first_samples(order.lane_pieces(0, [50] * 4, lane, 2), 200) for lane in (0, 1))
    assert one[:100] != other[:100]
    assert not set(one[:100]) & set(other[:100])
    assert one[:100] != one[100:]
    assert one[:50] != sorted(one[:50])


def test_every_lane_has_a_shard_and_whole_pairs():
    for num_shards, batch_size in itertools.product((1, 2, 3, 9, 1000), (2, 6, 64, 100, 1024)):
        lanes = order.num_lanes(num_shards, batch_size)
        assert 1 <= lanes <= num_shards
        assert batch_size % (2 * lanes) == 0
        assert lanes & (lanes - 1) == 0
    assert [order.num_lanes(1000, n) for n in (64, 100, 512, 1024)] == [8, 2, 16, 32]
