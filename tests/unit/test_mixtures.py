"""Constructed samples of ring and grid, each with the scores that it must have."""

import numpy as np
import pytest

from ivegan.config import PROTOCOLS, Protocol
from ivegan.errors import UserError
from ivegan.evaluation import mixtures, points
from ivegan.order import modes


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def sample_mixture(
    rng: np.random.Generator,
    dataset: str,
    n: int,
    scale: float = 1,
    protocol: Protocol = PROTOCOLS["pacgan"],
) -> np.ndarray:
    means, std = modes(dataset, protocol)
    return means[rng.integers(len(means), size=n)] + scale * std * rng.standard_normal((n, 2))


@pytest.mark.parametrize(
    ("dataset", "mean_kl", "high_kl"), [("ring", 0.0014, 0.0028), ("grid", 0.0048, 0.0075)]
)
def test_a_perfect_sampler_scores_at_the_floor(rng, dataset, mean_kl, high_kl):
    runs = [mixtures.mixture(sample_mixture(rng, dataset, 2500), dataset) for _ in range(100)]
    found = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    assert set(found["modes"]) == {len(modes(dataset)[0])}
    # Standard errors over 100 runs: .0002 for the share, 8 % of itself at most for the KL.
    assert found["high_quality"].mean() == pytest.approx(1 - np.exp(-4.5), abs=0.0008)
    assert found["high_quality"].std() == pytest.approx(0.0021, abs=0.0005)
    for name in ("reverse_kl", "reverse_kl_all"):
        assert found[name].mean() == pytest.approx(mean_kl, rel=0.2)
        assert np.quantile(found[name], 0.95) == pytest.approx(high_kl, rel=0.25)
    assert found["std_ratio"].mean() == pytest.approx(1, abs=0.005)


def test_a_mode_counts_only_with_a_point_within_three_stds():
    means, std = modes("ring")
    near, far = means + np.array([2.99 * std, 0]), means + np.array([0, 3.01 * std])
    points = np.concatenate((near[:5], far[5:]))
    found = mixtures.mixture(points, "ring")
    assert found["modes"] == 5
    assert found["high_quality"] == 5 / 8
    assert found["reverse_kl"] == pytest.approx(np.log(8 / 5))
    assert found["reverse_kl_all"] == pytest.approx(0, abs=1e-12)
    two = mixtures.mixture(means[[1, 6]], "ring")
    assert two["reverse_kl"] == pytest.approx(np.log(4))
    nowhere = mixtures.mixture(np.full((10, 2), 0.01), "ring")
    assert (nowhere["modes"], nowhere["high_quality"]) == (0, 0)
    assert nowhere["reverse_kl"] == pytest.approx(np.log(8))
    with pytest.raises(UserError, match="diverged"):
        mixtures.mixture(np.array([[0.0, np.nan]]), "ring")


def test_std_ratio_is_the_spread_over_the_data_s_without_bridges_between_modes(rng):
    found = mixtures.mixture(sample_mixture(rng, "ring", 40_000, 0.25), "ring")
    assert found["std_ratio"] == pytest.approx(0.25, rel=0.01)
    assert found["std_ratio_min"] < found["std_ratio"] < found["std_ratio_max"]
    angles = rng.uniform(0, 2 * np.pi, 1000)
    bridge = 0.5 * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    points = np.concatenate((sample_mixture(rng, "ring", 4000), bridge))
    assert mixtures.mixture(points, "ring")["std_ratio"] == pytest.approx(1, abs=0.15)


def test_the_optimum_of_the_pair_discriminator_scores_as_derived(rng):
    _, std = modes("ring")
    x = sample_mixture(rng, "ring", 20_000)
    x_hat = x + std / np.sqrt(2) * rng.standard_normal((4, *x.shape))
    found = mixtures.reconstructed_points(x, x_hat, "ring")
    assert found["right_mode"] == 1.0
    assert found["residual_std_ratio"] == pytest.approx(1, abs=0.01)
    assert found["residual_p"] > 0.001
    marginal = mixtures.mixture(x_hat[0], "ring")
    assert marginal["high_quality"] == pytest.approx(1 - np.exp(-3), abs=0.005)
    assert marginal["std_ratio"] == pytest.approx(1.5**0.5, rel=0.01)


def test_variations_of_another_mode_or_another_spread_are_noticed(rng):
    x = sample_mixture(rng, "ring", 2000)
    assert mixtures.reconstructed_points(x, -x[None], "ring")["right_mode"] == 0.0
    copies = mixtures.reconstructed_points(x, np.stack([x, x]), "ring")
    assert copies["residual_std_ratio"] == 0.0
    assert copies["residual_p"] < 1e-6
    shifted = mixtures.reconstructed_points(x, x[None] + 0.005, "ring")
    assert shifted["residual_std_ratio"] == pytest.approx(2**0.5)
    protocol = PROTOCOLS["pacgan"]
    half = mixtures.reconstructed_points(x, x[None] + 0.005, "ring", protocol, 0.5**0.5 / 2)
    assert half["residual_std_ratio"] == pytest.approx(2 * 2**0.5)  # of a T of half the std
    without = mixtures.reconstructed_points(x, x[None], "ring", protocol, 0.0)
    assert without == {"right_mode": 1.0}


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("dataset", ["ring", "grid"])
def test_collapsed_and_over_spread_samples_score_under_the_floor(rng, dataset, name):
    protocol = PROTOCOLS[name]
    floor = points.perfect(dataset, 1000, 0, protocol)
    means, std = modes(dataset, protocol)
    assert floor["modes_floor"] == len(means)
    assert floor["std_ratio_floor"] == pytest.approx(1, abs=0.03)
    one = means[[0] * 1000] + std * rng.standard_normal((1000, 2))
    collapsed = mixtures.mixture(one, dataset, protocol)
    assert collapsed["modes"] == 1
    assert collapsed["reverse_kl"] == pytest.approx(np.log(len(means)))
    still = mixtures.mixture(means[rng.integers(len(means), size=1000)], dataset, protocol)
    assert still["std_ratio"] < 1e-9
    assert still["high_quality"] > floor["high_quality_floor"]  # narrower than the data
    wide = mixtures.mixture(sample_mixture(rng, dataset, 1000, 3, protocol), dataset, protocol)
    assert wide["high_quality"] < floor["high_quality_floor"] - 0.4
    assert wide["std_ratio"] > 1.8


def test_the_protocols_differ_in_the_corner_of_the_box_and_in_what_the_kl_counts():
    means, std = modes("ring")
    corner, far = means + 2.9 * std, means[[0] * 8] + 20 * std
    scores = {
        name: mixtures.mixture(
            np.concatenate((corner, far)), "ring", PROTOCOLS[name]._replace(ring=0.01)
        )
        for name in ("pacgan", "metz", "selfcond")
    }
    shares = {name: s["high_quality"] for name, s in scores.items()}
    assert shares == {"pacgan": 0.0, "metz": 0.0, "selfcond": 0.5}
    assert scores["pacgan"]["reverse_kl"] == pytest.approx(np.log(8))
    assert scores["metz"]["reverse_kl"] == scores["selfcond"]["reverse_kl"] < np.log(8)
    # The share of a Gaussian in a box of three stds.
    box = points.perfect("grid", 20_000, 0, PROTOCOLS["selfcond"])
    assert box["high_quality_floor"] == pytest.approx(0.9946, abs=0.0005)
