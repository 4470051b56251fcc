import itertools

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ivegan.errors import UserError
from ivegan.evaluation import metrics
from ivegan.order import modes


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def with_moments(
    rng: np.random.Generator, n: int, mean: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """Return n samples whose sample mean and covariance are exactly these."""
    x = rng.standard_normal((n, len(mean)))
    x -= x.mean(axis=0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T
    return mean + white @ np.linalg.cholesky(covariance).T


def sample_mixture(rng: np.random.Generator, dataset: str, n: int, scale: float = 1) -> np.ndarray:
    means, std = modes(dataset)
    return means[rng.integers(len(means), size=n)] + scale * std * rng.standard_normal((n, 2))


# --- Fréchet distance ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(200, 8), (5, 30)])
def test_frechet_distance_of_a_set_to_itself_is_zero(
    rng: np.random.Generator, n: int, d: int
) -> None:
    x = 100 * rng.standard_normal((n, d)) + 1000
    assert metrics.frechet_distance(x, x.copy()) == pytest.approx(0, abs=1e-6 * d)


def test_frechet_distance_of_axis_aligned_gaussians_is_the_closed_form(
    rng: np.random.Generator,
) -> None:
    std_a, std_b, shift = np.array([1.0, 2, 3]), np.array([2.0, 2, 0.5]), np.array([1.0, 0, -2])
    a = with_moments(rng, 50, np.zeros(3), np.diag(std_a**2))
    b = with_moments(rng, 90, shift, np.diag(std_b**2))
    expected = np.square(shift).sum() + np.square(std_a - std_b).sum()
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_agrees_with_a_matrix_square_root(rng: np.random.Generator) -> None:
    a = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6))
    b = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(cov_a @ cov_b))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_refuses_what_has_no_distance() -> None:
    with pytest.raises(UserError, match="at least 2 samples in each set, but one has 1"):
        metrics.frechet_distance(np.zeros((5, 3)), np.zeros((1, 3)))
    broken = np.array([[1.0, np.nan], [0.0, 1.0]])
    with pytest.raises(UserError, match="diverged"):
        metrics.frechet_distance(np.zeros((5, 2)), broken)


# --- Labels of generated images -----------------------------------------------------------------


def test_label_agreement_counts_over_all_draws() -> None:
    labels = np.array([0, 1, 2, 2])
    predicted = np.array([[0, 1, 2, 2], [0, 0, 0, 2]])
    assert metrics.label_agreement(labels, predicted)[0] == 6 / 8


def test_chance_agreement_is_the_mean_over_every_shuffle() -> None:
    labels, predicted = np.array([0, 1, 1, 2, 3]), np.array([1, 1, 4, 2, 1])
    every = [np.mean(labels[list(p)] == predicted) for p in itertools.permutations(range(5))]
    assert metrics.label_agreement(labels, predicted[None])[1] == pytest.approx(np.mean(every))


def test_attribute_agreement_gives_no_credit_for_always_saying_no() -> None:
    attributes = np.array([[1, 0], [0, 0], [0, 1], [0, 0], [0, 1]])
    never = np.zeros((3, 5, 2), dtype=np.int64)
    assert metrics.attribute_agreement(attributes, never) == (0.5, 0.5)
    assert metrics.attribute_agreement(attributes, attributes[None])[0] == 1.0


def test_attribute_agreement_leaves_constant_attributes_out() -> None:
    attributes = np.array([[1, 1], [0, 1]])
    assert metrics.attribute_agreement(attributes, 1 - attributes[None])[0] == 0.0
    with pytest.raises(UserError, match="No attribute differs"):
        metrics.attribute_agreement(attributes[:, 1:], attributes[None, :, 1:])


def test_variation_ratio_is_a_ratio_of_stds(rng: np.random.Generator) -> None:
    transformed = rng.standard_normal((4, 20, 3, 3))
    centre = 10 * rng.standard_normal((20, 3, 3))
    assert metrics.variation_ratio(0.5 * transformed + centre, transformed) == pytest.approx(0.5)
    assert metrics.variation_ratio(np.stack([centre] * 4), transformed) == pytest.approx(
        0, abs=1e-6
    )


# --- Codes --------------------------------------------------------------------------------------


def blobs(rng: np.random.Generator, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    labels = np.repeat(np.arange(4), per_class)
    return 10 * np.eye(4)[labels] + 0.1 * rng.standard_normal((len(labels), 4)), labels


def test_nearest_neighbour_accuracy_agrees_with_a_plain_search(rng: np.random.Generator) -> None:
    train, test = rng.standard_normal((60, 3)), rng.standard_normal((40, 3))
    train_labels, labels = rng.integers(4, size=60), rng.integers(4, size=40)
    nearest = np.square(test[:, None] - train[None]).sum(axis=2).argmin(axis=1)
    found = metrics.nearest_neighbour_accuracy(train, train_labels, test, labels)
    assert found == np.mean(train_labels[nearest] == labels)


def test_linear_probe_separates_what_a_plane_separates(rng: np.random.Generator) -> None:
    train, train_labels = blobs(rng, 20)
    test, labels = blobs(rng, 10)
    assert metrics.linear_probe_accuracy(train, train_labels, test, labels) == 1.0
    turned = metrics.linear_probe_accuracy(train, train_labels, test, (labels + 1) % 4)
    assert turned == 0.0
    with pytest.raises(UserError, match="two classes"):
        metrics.linear_probe_accuracy(train, np.zeros_like(train_labels), test, labels)


def test_linear_probe_does_not_mind_the_scale_of_a_code(rng: np.random.Generator) -> None:
    labels = rng.integers(2, size=300)
    codes = rng.standard_normal((300, 2))
    codes[:, 0] += 3 * labels
    scales = np.array([1e-6, 1e4])  # the entry that separates the classes is the smallest by far
    parts = codes[:200], labels[:200], codes[200:], labels[200:]
    scaled = codes[:200] * scales, labels[:200], codes[200:] * scales, labels[200:]
    expected = metrics.linear_probe_accuracy(*parts)
    assert expected > 0.85
    assert metrics.linear_probe_accuracy(*scaled) == expected


def test_attribute_probes_find_what_is_linear_in_the_code(rng: np.random.Generator) -> None:
    train, test = rng.standard_normal((400, 5)), rng.standard_normal((200, 5))
    linear = (train[:, :2] > 1).astype(np.int64), (test[:, :2] > 1).astype(np.int64)
    scores = metrics.attribute_probes(train, linear[0], test, linear[1])
    assert scores["attribute_auroc"] > 0.98
    assert scores["attribute_ap"] > 0.9
    assert scores["attribute_balanced"] > 0.9
    assert scores["attribute_ap_chance"] == pytest.approx(linear[1].mean())
    noise = rng.integers(2, size=(400, 2)), rng.integers(2, size=(200, 2))
    scores = metrics.attribute_probes(train, noise[0], test, noise[1])
    for name in ("attribute_auroc", "attribute_balanced", "attribute_ap"):
        assert scores[name] == pytest.approx(0.5, abs=0.1)


def test_clusters_are_matched_to_classes_whatever_their_numbers(rng: np.random.Generator) -> None:
    codes, labels = blobs(rng, 25)
    renamed = np.array([7, 3, 5, 0])[labels]
    assert metrics.clustering(codes, renamed) == (pytest.approx(1.0), 1.0)


def test_clusters_of_noise_share_no_information_with_the_classes(rng: np.random.Generator) -> None:
    codes, labels = rng.standard_normal((400, 3)), rng.integers(4, size=400)
    nmi, accuracy = metrics.clustering(codes, labels)
    assert nmi < 0.05
    assert accuracy < 0.4


def test_half_wrong_clusters_have_half_the_accuracy(rng: np.random.Generator) -> None:
    codes, labels = blobs(rng, 20)
    mixed = np.where(np.arange(80) % 2 == 0, labels, (labels + 1) % 4)
    assert metrics.clustering(codes, mixed)[1] == 0.5


def test_retrieval_fails_for_just_those_that_move_past_a_neighbour() -> None:
    codes = np.arange(10.0)[:, None]
    moved = codes.copy()
    moved[:3] += 0.6  # nearer to the next code than to their own
    moved[3:] += 0.4
    assert metrics.retrieval_accuracy(codes, moved) == 0.7


# --- Mixtures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dataset", "count"), [("ring", 8), ("grid", 25)])
def test_modes_are_distinct(dataset: str, count: int) -> None:
    means, std = modes(dataset)
    gaps = np.linalg.norm(means[:, None] - means[None], axis=2) + 1e9 * np.eye(len(means))
    assert len(means) == count
    assert gaps.min() > 20 * std


@pytest.mark.parametrize(
    ("dataset", "mean_kl", "high_kl"), [("ring", 0.0014, 0.0028), ("grid", 0.0048, 0.0075)]
)
def test_a_perfect_sampler_scores_at_the_floor(
    rng: np.random.Generator, dataset: str, mean_kl: float, high_kl: float
) -> None:
    runs = [metrics.mixture(sample_mixture(rng, dataset, 2500), dataset) for _ in range(200)]
    found = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    assert set(found["modes"]) == {len(modes(dataset)[0])}
    # Standard errors over 200 runs: .00015 for the share, 6 % of itself at most for the KL.
    assert found["high_quality"].mean() == pytest.approx(1 - np.exp(-4.5), abs=0.0006)
    assert found["high_quality"].std() == pytest.approx(0.0021, abs=0.0005)
    for name in ("reverse_kl", "reverse_kl_all"):
        assert found[name].mean() == pytest.approx(mean_kl, rel=0.2)
        assert np.quantile(found[name], 0.95) == pytest.approx(high_kl, rel=0.25)
    assert found["std_ratio"].mean() == pytest.approx(1, abs=0.005)


def test_reverse_kl_counts_the_modes_that_are_missed() -> None:
    means, _ = modes("ring")
    assert metrics.mixture(means[[0] * 5], "ring")["reverse_kl"] == pytest.approx(np.log(8))
    assert metrics.mixture(means[[1, 6]], "ring")["reverse_kl"] == pytest.approx(np.log(4))
    assert metrics.mixture(means, "ring")["reverse_kl"] == pytest.approx(0, abs=1e-12)


def test_a_mode_counts_only_with_a_point_within_three_stds() -> None:
    means, std = modes("ring")
    near, far = means + np.array([2.99 * std, 0]), means + np.array([0, 3.01 * std])
    points = np.concatenate((near[:5], far[5:]))
    found = metrics.mixture(points, "ring")
    assert found["modes"] == 5
    assert found["high_quality"] == 5 / 8
    assert found["reverse_kl"] == pytest.approx(np.log(8 / 5))
    assert found["reverse_kl_all"] == pytest.approx(0, abs=1e-12)


def test_points_far_from_everything_score_the_worst_there_is() -> None:
    found = metrics.mixture(np.full((10, 2), 0.01), "ring")
    assert (found["modes"], found["high_quality"]) == (0, 0)
    assert found["reverse_kl"] == pytest.approx(np.log(8))


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.5**0.5])
def test_std_ratio_is_the_spread_over_the_data_s(rng: np.random.Generator, scale: float) -> None:
    found = metrics.mixture(sample_mixture(rng, "ring", 40_000, scale), "ring")
    assert found["std_ratio"] == pytest.approx(scale, rel=0.01)
    assert found["std_ratio_min"] < found["std_ratio"] < found["std_ratio_max"]


def test_std_ratio_leaves_bridges_between_modes_out(rng: np.random.Generator) -> None:
    angles = rng.uniform(0, 2 * np.pi, 1000)
    bridge = 0.5 * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    points = np.concatenate((sample_mixture(rng, "ring", 4000), bridge))
    assert metrics.mixture(points, "ring")["std_ratio"] == pytest.approx(1, abs=0.15)


def test_std_ratio_is_large_where_nothing_is_near_a_mode(rng: np.random.Generator) -> None:
    means, std = modes("ring")
    points = 1.4 * means[rng.integers(8, size=500)] + 8 * std * rng.standard_normal((500, 2))
    assert metrics.mixture(points, "ring")["std_ratio"] > 5


def test_the_optimum_of_the_pair_discriminator_scores_as_derived(rng: np.random.Generator) -> None:
    _, std = modes("ring")
    x = sample_mixture(rng, "ring", 20_000)
    x_hat = x + std / np.sqrt(2) * rng.standard_normal((4, *x.shape))
    found = metrics.reconstructed_points(x, x_hat, "ring")
    assert found["right_mode"] == 1.0
    assert found["residual_std_ratio"] == pytest.approx(1, abs=0.01)
    assert found["residual_p"] > 0.001
    marginal = metrics.mixture(x_hat[0], "ring")
    assert marginal["high_quality"] == pytest.approx(1 - np.exp(-3), abs=0.005)
    assert marginal["std_ratio"] == pytest.approx(1.5**0.5, rel=0.01)


def test_variations_of_another_mode_or_another_spread_are_noticed(
    rng: np.random.Generator,
) -> None:
    x = sample_mixture(rng, "ring", 2000)
    assert metrics.reconstructed_points(x, -x[None], "ring")["right_mode"] == 0.0
    copies = metrics.reconstructed_points(x, np.stack([x, x]), "ring")
    assert copies["residual_std_ratio"] == 0.0
    assert copies["residual_p"] < 1e-6
    shifted = metrics.reconstructed_points(x, x[None] + 0.005, "ring")
    assert shifted["residual_std_ratio"] == pytest.approx(2**0.5)


def test_points_that_are_not_finite_are_reported_as_divergence() -> None:
    with pytest.raises(UserError, match="diverged"):
        metrics.mixture(np.array([[0.0, np.nan]]), "ring")
