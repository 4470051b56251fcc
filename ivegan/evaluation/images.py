"""Measures of a checkpoint trained on images, with held-out images of the same data set."""

import contextlib
import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ivegan import storage
from ivegan.config import Config
from ivegan.data.cache import load_split
from ivegan.data.manifest import read_manifest
from ivegan.errors import UserError
from ivegan.evaluation import metrics, pictures, registration
from ivegan.evaluation.classifier import Classifier, classifier_of, classify
from ivegan.evaluation.metrics import Labelled
from ivegan.evaluation.report import Figure
from ivegan.evaluation.sampling import (
    FITTED,
    NUM_DRAWS,
    PIXEL_SIDE,
    PRIOR,
    REGISTRATION,
    TRANSFORM,
    VARIATIONS,
    Sampler,
    batches,
    evenly,
    pixels,
    stream,
)
from ivegan.layers.build import initialise
from ivegan.networks import Encoder, sample_shape
from ivegan.storage.digest import digest
from ivegan.storage.schema import DamagedError, read

log = logging.getLogger(__name__)

_REGISTERED_IMAGES = 256  # each is transformed some 800 times
_MANIFOLD_SAMPLES = 5000  # of precision and recall, whose time grows with the square
_MIXTURE_CODES, _MIXTURE_COMPONENTS = 10_000, 20  # of the fitted prior


class EvaluationData(NamedTuple):
    """Train images, and held-out images, all or some."""

    train: np.ndarray
    train_labels: np.ndarray
    x: np.ndarray
    labels: np.ndarray
    """Of x: classes (n,), or 0/1 attributes (n, a)."""
    label_names: list[str]
    hash: str
    """Of the whole data set."""


def load(
    config: Config,
    data_uri: str,
    name: str,
    cache_dir: Path,
    limit: int | None,
    *,
    skip_bad: bool = False,
) -> EvaluationData:
    """Return the train split and held-out images of the split so named, at most ``limit``.

    With ``skip_bad``, train images are left out that training has left out.

    Raises:
        UserError: images of another shape than the networks take.
    """
    manifest, shape = read_manifest(data_uri), sample_shape(config.model)
    if tuple(manifest.image_shape) != shape:
        raise UserError(
            f"The images of {data_uri} are {tuple(manifest.image_shape)}, but the checkpoint's "
            f"networks take {shape}; give the data set that it was trained on."
        )
    train = load_split(data_uri, "train", cache_dir, skip_bad=skip_bad)
    held_out = load_split(data_uri, name, cache_dir)
    chosen = _at_most(limit, len(held_out.images))
    return EvaluationData(
        train.images,
        train.labels,
        held_out.images[chosen],
        held_out.labels[chosen],
        list(manifest.label_names),
        train.dataset_hash,
    )


def _at_most(limit: int | None, total: int) -> slice | np.ndarray:
    # A slice leaves the images in the memory-mapped file.
    return slice(None) if limit is None or limit >= total else evenly(total, limit)


def evaluate(
    sampler: Sampler, split: EvaluationData, cache_dir: Path, seed: int
) -> tuple[dict[str, float], list[Figure]]:
    """Return metrics and figures of a checkpoint, as for ``measure``."""
    result, codes, fitted = measure(sampler, split, cache_dir, seed)
    assert fitted is not None, "a checkpoint has a generator"
    log.info("drawing figures")
    figures, maps = pictures.draw(sampler, split, codes, fitted, seed)
    return result | maps, figures


def measure(
    sampler: Sampler, split: EvaluationData, cache_dir: Path, seed: int
) -> tuple[dict[str, float], np.ndarray, torch.Tensor | None]:
    """Return the numbers of an evaluation, the codes of held-out images, and z fitted to codes.

    Args:
        sampler: the networks; without a generator only codes are measured, and no z is fitted.
        split: train and held-out images.
        cache_dir: for the classifier and the numbers of raw pixels.
        seed: of every draw.
    """
    log.info("encoding %s train and %s test images", f"{len(split.train):,}", f"{len(split.x):,}")
    codes, train_codes = sampler.encode(split.x), sampler.encode(split.train)
    of_codes = {
        **probes(Labelled(train_codes, split.train_labels), Labelled(codes, split.labels), seed),
        **pixel_probes(split, cache_dir, seed),
        **invariance(sampler, split.x, codes, seed),
        "saturation": metrics.saturation(codes),
    }
    if sampler.generator is None:
        return of_codes, codes, None
    fitted = fitted_prior(train_codes, len(codes), seed)
    generated = generation(sampler, split, codes, cache_dir, seed, fitted=fitted)
    return generated | of_codes | transformation(sampler, split.x, codes, seed), codes, fitted


def quality(
    sampler: Sampler, split: EvaluationData, cache_dir: Path, seed: int, num_train: int | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the components of ``quality``, each in [0, 1], and the Fréchet distance beside them.

    At most ``num_train`` train images are looked at; all by default.
    """
    chosen = _at_most(num_train, len(split.train))
    train, train_labels = split.train[chosen], split.train_labels[chosen]
    codes = sampler.encode(split.x)
    result = generation(sampler, split, codes, cache_dir, seed, real=train)
    known = Labelled(sampler.encode(train), train_labels), Labelled(codes, split.labels)
    parts = {"near": min(1.0, result["frechet_floor"] / max(result["frechet"], 1e-12))}
    if split.labels.ndim == 1:
        parts["same_class"] = result["same_class"]
        parts["one_nn"] = metrics.nearest_neighbour_accuracy(*known)
    else:
        parts["same_attributes"] = result["same_attributes"]
        parts["probe_auroc"] = metrics.attribute_probes(*known)["attribute_auroc"]
    return parts, {"frechet": result["frechet"]}


def generation(
    sampler: Sampler,
    split: EvaluationData,
    codes: np.ndarray,
    cache_dir: Path,
    seed: int,
    *,
    real: np.ndarray | None = None,
    fitted: torch.Tensor | None = None,
) -> dict[str, float]:
    """Return what the classifier, trained on all train images, reads from samples and variations.

    Args:
        real: train images that samples are compared with; all by default.
        fitted: z from a prior fitted to the codes; with it, also what else there is to compare
            of samples from either prior and of variations.
    """
    judge = classifier_of(split.train, split.train_labels, split.hash, cache_dir)
    judge = judge.to(sampler.device)
    train = split.train if real is None else real
    _, real_features = _read(judge, batches(train))
    labels, held_out = _read(judge, batches(split.x))
    count = len(split.x)
    log.info("classifying %s samples and %s variations", f"{count:,}", f"{NUM_DRAWS * count:,}")
    draws = stream(seed, PRIOR)
    z = sampler.prior(count, draws)
    _, fake = _read(judge, sampler.generate_batches(sampler.noise(count, draws), z))
    draws, z = stream(seed, VARIATIONS), torch.from_numpy(codes)
    variations = [
        _read(judge, sampler.generate_batches(sampler.noise(count, draws), z))
        for _ in range(NUM_DRAWS)
    ]
    classes = split.labels.ndim == 1
    agreement = metrics.label_agreement if classes else metrics.attribute_agreement
    name = "same_class" if classes else "same_attributes"
    same, chance = agreement(split.labels, np.stack([predicted for predicted, _ in variations]))
    result = {
        name: same,
        f"{name}_shuffled": chance,
        "classifier_accuracy": agreement(split.labels, labels[None])[0],
        "frechet": metrics.frechet_distance(fake, real_features),
        "frechet_floor": metrics.frechet_distance(held_out, real_features),
    }
    if fitted is None:
        return result
    moved, held_out_moved = real_features, held_out
    if sampler.varies:
        # D compares variations with T(x), so they, and samples from a prior fitted to codes, are
        # distributed as T(x); D' compares samples from the printed prior with x.
        draws = stream(seed, TRANSFORM)
        _, moved = _read(judge, (sampler.transformed(batch, draws) for batch in batches(train)))
        _, held_out_moved = _read(judge, (sampler.transformed(b, draws) for b in batches(split.x)))
    noise = sampler.noise(len(fitted), stream(seed, FITTED))
    _, refitted = _read(judge, sampler.generate_batches(noise, fitted))
    result["frechet_fitted"] = metrics.frechet_distance(refitted, moved)
    result["frechet_recon"] = metrics.frechet_distance(variations[0][1], moved)
    result["frechet_recon_floor"] = metrics.frechet_distance(held_out_moved, moved)
    few = min(len(real_features), len(fake), _MANIFOLD_SAMPLES)  # as many of each
    chosen, held_out = evenly(len(real_features), few), held_out[evenly(count, few)]
    for ending, reference, features in (
        ("", real_features, fake),
        ("_fitted", moved, refitted),
        ("_floor", real_features, held_out),
    ):
        scores = metrics.coverage_of(reference[chosen], features[:few])
        result |= {f"{key}{ending}": value for key, value in scores.items()}
    return result


def fitted_prior(train_codes: np.ndarray, count: int, seed: int) -> torch.Tensor:
    """Return draws of z from a mixture of Gaussians fitted to the codes of train images."""
    from sklearn.mixture import GaussianMixture

    codes = train_codes[evenly(len(train_codes), min(len(train_codes), _MIXTURE_CODES))]
    components = max(1, min(_MIXTURE_COMPONENTS, len(codes) // 50))
    kind = "full" if codes.shape[1] <= 64 else "diag"  # more entries than codes can determine
    model = GaussianMixture(components, covariance_type=kind, reg_covar=1e-4, random_state=seed)
    z = model.fit(codes.astype(np.float64)).sample(count)[0]
    z = np.random.default_rng(seed).permutation(z)  # sklearn returns one component after another
    return torch.from_numpy(z.clip(-1, 1).astype(np.float32))


def _read(judge: Classifier, images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the classifier's labels and features of images that come in batches."""
    labels, features = zip(*(classify(judge, batch) for batch in images), strict=True)
    return np.concatenate(labels), np.concatenate(features)


def probes(train: Labelled, test: Labelled, seed: int) -> dict[str, float]:
    """Return the accuracy of probes and of clusters of codes, or of pixels."""
    if test.labels.ndim == 2:
        return metrics.attribute_probes(train, test)
    nmi, accuracy = metrics.clustering(*test, seed=seed)
    return {
        "one_nn": metrics.nearest_neighbour_accuracy(train, test),
        "linear_probe": metrics.linear_probe_accuracy(train, test),
        "few_labels": metrics.few_label_accuracy(train, test, seed=seed),
        "kmeans_nmi": nmi,
        "kmeans_accuracy": accuracy,
        "majority": float(np.bincount(test.labels).max() / len(test.labels)),
    }


def pixel_probes(split: EvaluationData, cache_dir: Path, seed: int) -> dict[str, float]:
    """Return the same probes on raw pixels, which depend on the data alone: kept in the cache."""
    key = digest(["pixels", split.hash, len(split.x), seed, PIXEL_SIDE, 4])
    path = cache_dir / f"pixels-{key[:16]}.json"
    if path.exists():
        with contextlib.suppress(DamagedError):
            return read(path.read_bytes(), dict, str(path))
        log.warning("%s is damaged: computing it again", path)
    log.info("probing raw pixels for comparison, once per data set")
    train = Labelled(pixels(split.train), split.train_labels)
    result = probes(train, Labelled(pixels(split.x), split.labels), seed)
    result = {f"{name}_pixels": value for name, value in result.items() if name != "majority"}
    storage.write_bytes(path, json.dumps(result).encode())
    return result


def invariance(sampler: Sampler, x: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, float]:
    """Return whether E ignores T, beside pixels and an untrained E."""
    draws = stream(seed, TRANSFORM)
    moved = np.concatenate([sampler.transformed(batch, draws) for batch in batches(x)])
    untrained = Encoder(sampler.config.model)
    initialise(untrained, seed)
    random = replace(sampler, encoder=untrained.to(sampler.device).eval())
    return {
        "retrieval": metrics.retrieval_accuracy(codes, sampler.encode(moved)),
        "retrieval_pixels": metrics.retrieval_accuracy(pixels(x), pixels(moved)),
        "retrieval_random": metrics.retrieval_accuracy(random.encode(x), random.encode(moved)),
        "retrieval_chance": 1 / len(x),
    }


def transformation(
    sampler: Sampler, x: np.ndarray, codes: np.ndarray, seed: int
) -> dict[str, float]:
    """Return whether z' replaces T: its spread, what it explains of T, and the error beside T."""
    draws, t = stream(seed, REGISTRATION), sampler.config.transform
    chosen = evenly(len(x), min(len(x), _REGISTERED_IMAGES))
    x, z = x[chosen], torch.from_numpy(codes[chosen])
    noise = [sampler.noise(len(z), draws) for _ in range(NUM_DRAWS)]
    variations = np.stack([sampler.generate(one, z) for one in noise])
    transformed = np.stack([sampler.transformed(x, draws) for _ in range(NUM_DRAWS)])
    places, errors = registration.register(x, variations[0], t)
    result = {
        "variation_ratio": metrics.variation_ratio(
            variations.astype(np.float32), transformed.astype(np.float32)
        ),
        "registered_error": float(errors.mean()),
        "registered_error_floor": float(registration.register(x, transformed[0], t)[1].mean()),
        "registered_error_chance": float(
            registration.register(np.roll(x, 1, axis=0), variations[0], t)[1].mean()
        ),
    }
    explained = registration.explained_variance(noise[0].numpy(), places)
    sizes = {"dx": t.shift, "dy": t.shift, "theta": t.rotate}
    for (name, size), value in zip(sizes.items(), explained, strict=True):
        if size:
            result[f"transform/r2_{name}"] = float(value)
    return result
