import itertools

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ivegan.errors import UserError
from ivegan.evaluation import metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- Fréchet distance ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(200, 8), (5, 30)])
def test_frechet_distance_of_a_set_to_itself_is_zero(rng, n, d):
    x = 100 * rng.standard_normal((n, d)) + 1000
    assert metrics.frechet_distance(x, x.copy()) == pytest.approx(0, abs=1e-6 * d)


def test_frechet_distance_agrees_with_a_matrix_square_root(rng):
    a = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6))
    b = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(cov_a @ cov_b))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_refuses_what_has_no_distance():
    with pytest.raises(UserError, match="at least 2 samples in each set, but one has 1"):
        metrics.frechet_distance(np.zeros((5, 3)), np.zeros((1, 3)))
    broken = np.array([[1.0, np.nan], [0.0, 1.0]])
    with pytest.raises(UserError, match="diverged"):
        metrics.frechet_distance(np.zeros((5, 2)), broken)


# --- Labels of generated images -----------------------------------------------------------------


def test_label_agreement_counts_over_all_draws():
    labels = np.array([0, 1, 2, 2])
    predicted = np.array([[0, 1, 2, 2], [0, 0, 0, 2]])
    assert metrics.label_agreement(labels, predicted)[0] == 6 / 8


def test_chance_agreement_is_the_mean_over_every_shuffle():
    labels, predicted = np.array([0, 1, 1, 2, 3]), np.array([1, 1, 4, 2, 1])
    every = [np.mean(labels[list(p)] == predicted) for p in itertools.permutations(range(5))]
    assert metrics.label_agreement(labels, predicted[None])[1] == pytest.approx(np.mean(every))


def test_attribute_agreement_gives_no_credit_for_always_saying_no():
    attributes = np.array([[1, 0], [0, 0], [0, 1], [0, 0], [0, 1]])
    never = np.zeros((3, 5, 2), dtype=np.int64)
    assert metrics.attribute_agreement(attributes, never) == (0.5, 0.5)
    assert metrics.attribute_agreement(attributes, attributes[None])[0] == 1.0
    with pytest.raises(UserError, match="No attribute differs"):
        metrics.attribute_agreement(attributes[1:2], attributes[None, 1:2])


def test_variation_ratio_is_a_ratio_of_stds(rng):
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


def test_linear_probe_separates_what_a_plane_separates(rng):
    train, train_labels = blobs(rng, 20)
    test, labels = blobs(rng, 10)
    assert metrics.linear_probe_accuracy(train, train_labels, test, labels) == 1.0
    turned = metrics.linear_probe_accuracy(train, train_labels, test, (labels + 1) % 4)
    assert turned == 0.0
    with pytest.raises(UserError, match="two classes"):
        metrics.linear_probe_accuracy(train, np.zeros_like(train_labels), test, labels)


def test_linear_probe_does_not_mind_the_scale_of_a_code(rng):
    labels = rng.integers(2, size=300)
    codes = rng.standard_normal((300, 2))
    codes[:, 0] += 3 * labels
    scales = np.array([1e-6, 1e4])  # the entry that separates the classes is the smallest by far
    parts = codes[:200], labels[:200], codes[200:], labels[200:]
    scaled = codes[:200] * scales, labels[:200], codes[200:] * scales, labels[200:]
    expected = metrics.linear_probe_accuracy(*parts)
    assert expected > 0.85
    assert metrics.linear_probe_accuracy(*scaled) == expected


def test_attribute_probes_find_what_is_linear_in_the_code(rng):
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


def test_clusters_are_matched_to_classes_whatever_their_numbers(rng):
    codes, labels = blobs(rng, 25)
    renamed = np.array([7, 3, 5, 0])[labels]
    assert metrics.clustering(codes, renamed) == (pytest.approx(1.0), 1.0)


def test_wrong_clusters_have_less_accuracy_and_information(rng):
    noise = metrics.clustering(rng.standard_normal((400, 3)), rng.integers(4, size=400))
    assert noise[0] < 0.05
    assert noise[1] < 0.4
    codes, labels = blobs(rng, 20)
    mixed = np.where(np.arange(80) % 2 == 0, labels, (labels + 1) % 4)
    assert metrics.clustering(codes, mixed)[1] == 0.5


def test_retrieval_fails_for_just_those_that_move_past_a_neighbour():
    codes = np.arange(10.0)[:, None]
    moved = codes.copy()
    moved[:3] += 0.6  # nearer to the next code than to their own
    moved[3:] += 0.4
    assert metrics.retrieval_accuracy(codes, moved) == 0.7


def test_saturated_entries_are_those_at_the_ends_of_tanh():
    assert metrics.saturation(np.array([[0.995, -0.995, 0.98, 0.0]])) == 0.5


def test_few_labels_are_enough_for_blobs_and_not_for_noise(rng):
    (train, train_labels), (test, labels) = blobs(rng, 40), blobs(rng, 20)
    assert metrics.few_label_accuracy(train, train_labels, test, labels) == 1.0
    noise = rng.standard_normal(train.shape), train_labels, rng.standard_normal(test.shape), labels
    assert metrics.few_label_accuracy(*noise) < 0.45
    one = metrics.few_label_accuracy(train, train_labels, test, labels, per_class=1, draws=1)
    assert one > 0.9


def test_neighbours_are_pure_where_an_attribute_lies_in_one_place(rng):
    positions = rng.standard_normal((400, 2))
    attributes = np.stack((positions[:, 0] > 1, rng.integers(2, size=400)), axis=1).astype(int)
    purity, chance = metrics.neighbour_purity(positions, attributes[:, :1])
    assert purity > 0.8
    assert chance == pytest.approx(attributes[:, 0].mean())
    assert metrics.neighbour_purity(positions, attributes[:, 1:])[0] == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="No sample has"):
        metrics.neighbour_purity(positions, np.zeros((400, 2), dtype=int))


def test_precision_and_recall_tell_narrow_samples_from_wide_ones(rng):
    real = rng.standard_normal((400, 4))
    equal = metrics.coverage_of(real, rng.standard_normal((400, 4)))
    assert all(value == pytest.approx(0.95, abs=0.12) for value in equal.values())
    narrow = metrics.coverage_of(real, 0.1 * rng.standard_normal((400, 4)))
    assert narrow["precision"] == 1.0
    assert narrow["recall"] < 0.1
    assert narrow["coverage"] < 0.3
    assert narrow["density"] > 1.2
    wide = metrics.coverage_of(real, 5 * rng.standard_normal((400, 4)))
    assert wide["precision"] < 0.1
    assert wide["recall"] > 0.9
    assert wide["density"] < 0.1
    with pytest.raises(UserError, match="more than 5 samples"):
        metrics.coverage_of(real, real[:5])
