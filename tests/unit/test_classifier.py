from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ivegan.data.cache import load_split
from ivegan.evaluation import classifier
from ivegan.evaluation.classifier import Settings, classifier_of, classify, train_classifier

QUICK = Settings(images=600, epochs=1, batch_size=20)
Squares = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def squares() -> Squares:
    """Return images with one bright quarter each, and which quarter it is."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 15)
    images = rng.integers(60, size=(60, 1, 16, 16), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), 2)
        image[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 180
    return images, labels


def test_threads_do_not_change_the_weights_nor_training_the_random_state(squares: Squares) -> None:
    weights = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(threads)  # nor does anybody else's random state
        state = torch.get_rng_state()
        weights.append(train_classifier(*squares, QUICK).state_dict())
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_predictions_do_not_depend_on_the_batch(squares: Squares) -> None:
    model = train_classifier(*squares, QUICK)
    images = squares[0]
    labels, features = classify(model, images)
    alone = classify(model, images[7:8])
    assert alone[0][0] == labels[7]
    # Not bit for bit: another batch size may take another matrix kernel.
    np.testing.assert_allclose(alone[1][0], features[7], rtol=1e-4, atol=1e-5)
    assert np.mean(labels == squares[1]) > 0.9


def test_a_trained_classifier_is_kept_and_not_trained_again(
    squares: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = classifier_of(*squares, "hash", tmp_path, QUICK)
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".lock"}

    def never(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(classifier, "train_classifier", never)
    second = classifier_of(*squares, "hash", tmp_path, QUICK)
    assert not second.training
    np.testing.assert_array_equal(classify(first, squares[0])[1], classify(second, squares[0])[1])
    for data, settings in (("other data", QUICK), ("hash", Settings(images=600, epochs=1, seed=1))):
        with pytest.raises(AssertionError, match="trained again"):
            classifier_of(*squares, data, tmp_path, settings)
    (weights,) = tmp_path.glob("*/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-64] + bytes(64))  # damage is found
    with pytest.raises(AssertionError, match="trained again"):
        classifier_of(*squares, "hash", tmp_path, QUICK)


def test_of_several_that_want_it_at_once_one_trains_it(
    squares: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def counted(*arguments: Any) -> classifier.Classifier:
        trained.append(train_classifier(*arguments))
        return trained[-1]

    monkeypatch.setattr(classifier, "train_classifier", counted)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: classifier_of(*squares, "hash", tmp_path, QUICK), range(2)))
    assert len(trained) == 1


def test_attributes_of_large_images_in_colour_are_read_side_by_side(squares: Squares) -> None:
    images = np.repeat(squares[0].repeat(4, axis=2).repeat(4, axis=3), 3, axis=1)
    attributes = np.stack((squares[1] >= 2, squares[1] % 2 == 1), axis=1).astype(np.int64)
    model = train_classifier(images, attributes, QUICK)
    assert model.side == 32  # averaged down
    labels, features = classify(model, images)
    assert features.shape == (60, 64)
    assert labels.shape == attributes.shape
    assert np.mean(labels == attributes) > 0.9


@pytest.mark.slow
def test_it_reads_mnist(test_data: Path, tmp_path: Path) -> None:
    from data_prep.building import build

    out = tmp_path / "mnist"
    build("mnist", str(test_data / "mnist"), str(out), workers=0)
    train = load_split(str(out), "train", tmp_path)
    test = load_split(str(out), "test", tmp_path)
    model = train_classifier(train.images[:10_000], train.labels[:10_000])
    assert np.mean(classify(model, test.images)[0] == test.labels) > 0.97
