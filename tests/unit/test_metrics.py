import itertools

import numpy as np
import pytest
from scipy.linalg import sqrtm

from ivegan.errors import UserError
from ivegan.evaluation import metrics
from ivegan.evaluation.metrics import Labelled


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# --- Generated images ---------------------------------------------------------------------------


def test_frechet_distance_agrees_with_a_matrix_square_root(rng):
    a = rng.standard_normal((300, 6)) @ rng.standard_normal((6, 6))
    b = rng.standard_normal((400, 6)) @ rng.standard_normal((6, 6)) + 1
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = np.real(sqrtm(cov_a @ cov_b))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    few = 100 * rng.standard_normal((5, 30)) + 1000  # a singular covariance
    assert metrics.frechet_distance(few, few.copy()) == pytest.approx(0, abs=3e-5)


def test_frechet_distance_refuses_what_has_no_distance():
    with pytest.raises(UserError, match="at least 2 samples in each set, but one has 1"):
        metrics.frechet_distance(np.zeros((5, 3)), np.zeros((1, 3)))
    with pytest.raises(UserError, match="diverged"):
        metrics.frechet_distance(np.zeros((5, 2)), np.array([[1.0, np.nan], [0.0, 1.0]]))


def test_label_agreement_counts_over_all_draws_and_chance_over_every_shuffle():
    predicted = np.array([[0, 1, 2, 2], [0, 0, 0, 2]])
    assert metrics.label_agreement(np.array([0, 1, 2, 2]), predicted)[0] == 6 / 8
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
    for share in (0.5, 0.0):
        found = metrics.variation_ratio(share * transformed + centre, transformed)
        assert found == pytest.approx(share, abs=1e-6)


def test_precision_and_recall_tell_narrow_samples_from_wide_ones(rng):
    real = rng.standard_normal((400, 4))
    equal = metrics.coverage_of(real, rng.standard_normal((400, 4)))
    assert all(value == pytest.approx(0.95, abs=0.12) for value in equal.values())
    narrow = metrics.coverage_of(real, 0.1 * rng.standard_normal((400, 4)))
    assert narrow["precision"] == 1.0
    assert narrow["density"] > 1.2
    assert max(narrow["recall"], narrow["coverage"]) < 0.3
    wide = metrics.coverage_of(real, 5 * rng.standard_normal((400, 4)))
    assert wide["recall"] > 0.9
    assert max(wide["precision"], wide["density"]) < 0.1
    with pytest.raises(UserError, match="more than 5 samples"):
        metrics.coverage_of(real, real[:5])


# --- Codes --------------------------------------------------------------------------------------


def blobs(rng: np.random.Generator, per_class: int) -> Labelled:
    labels = np.repeat(np.arange(4), per_class)
    return Labelled(10 * np.eye(4)[labels] + 0.1 * rng.standard_normal((len(labels), 4)), labels)


def test_linear_probes_separate_what_a_plane_separates_at_any_scale(rng):
    train, test = blobs(rng, 40), blobs(rng, 20)
    scales = np.array([1e-6, 1e4, 1, 1])
    scaled = [Labelled(codes * scales, labels) for codes, labels in (train, test)]
    for probe in (metrics.linear_probe_accuracy, metrics.few_label_accuracy):
        assert probe(*scaled) == 1.0
        assert probe(train, Labelled(test.codes, (test.labels + 1) % 4)) == 0.0
    noise = [Labelled(rng.standard_normal(one.codes.shape), one.labels) for one in (train, test)]
    assert metrics.few_label_accuracy(*noise) < 0.45
    with pytest.raises(UserError, match="two classes"):
        metrics.linear_probe_accuracy(Labelled(train.codes, np.zeros(160, int)), test)


def test_attribute_probes_find_what_is_linear_in_the_code(rng):
    train, test = rng.standard_normal((400, 5)), rng.standard_normal((200, 5))
    linear = [Labelled(codes, (codes[:, :2] > 1).astype(np.int64)) for codes in (train, test)]
    scores = metrics.attribute_probes(*linear)
    assert scores.pop("attribute_ap_chance") == pytest.approx(linear[1].labels.mean())
    assert min(scores.values()) > 0.9
    noise = [Labelled(codes, rng.integers(2, size=(len(codes), 2))) for codes in (train, test)]
    scores = metrics.attribute_probes(*noise)
    assert list(scores.values()) == pytest.approx([0.5] * 4, abs=0.1)


def test_clusters_are_matched_to_classes_whatever_their_numbers(rng):
    codes, labels = blobs(rng, 20)
    assert metrics.clustering(codes, np.array([7, 3, 5, 0])[labels]) == (pytest.approx(1.0), 1.0)
    mixed = np.where(np.arange(80) % 2 == 0, labels, (labels + 1) % 4)
    assert metrics.clustering(codes, mixed)[1] == 0.5
    nmi, accuracy = metrics.clustering(rng.standard_normal((400, 3)), rng.integers(4, size=400))
    assert nmi < 0.05
    assert accuracy < 0.4


def test_retrieval_fails_for_just_those_that_move_past_a_neighbour():
    codes = np.arange(10.0)[:, None]
    moved = codes + 0.4
    moved[:3] += 0.2  # nearer to the next code than to their own
    assert metrics.retrieval_accuracy(codes, moved) == 0.7


def test_saturated_entries_are_those_at_the_ends_of_tanh():
    assert metrics.saturation(np.array([[0.995, -0.995, 0.98, 0.0]])) == 0.5


def test_neighbours_are_pure_where_an_attribute_lies_in_one_place(rng):
    positions = rng.standard_normal((400, 2))
    attributes = np.stack((positions[:, 0] > 1, rng.integers(2, size=400)), axis=1).astype(int)
    purity, chance = metrics.neighbour_purity(positions, attributes[:, :1])
    assert purity > 0.8
    assert chance == pytest.approx(attributes[:, 0].mean())
    assert metrics.neighbour_purity(positions, attributes[:, 1:])[0] == pytest.approx(0.5, abs=0.1)
    with pytest.raises(UserError, match="No sample has"):
        metrics.neighbour_purity(positions, np.zeros((400, 2), dtype=int))
