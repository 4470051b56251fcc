"""One checkpoint, measured: numbers in ``metrics.json``, the paper's figures, one HTML page.

Images are judged on the test split, all of it unless a limit is given, with four draws of z' for
each sample; points on 2,500 fresh ones, the protocol of VEEGAN and PacGAN. Every draw comes from
the seed, so the same checkpoint gives the same numbers again.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ivegan import checkpoint, storage
from ivegan.config import Config
from ivegan.data.cache import load_split
from ivegan.data.manifest import read_manifest
from ivegan.errors import UserError
from ivegan.evaluation import figures, metrics
from ivegan.evaluation.classifier import Classifier, classifier_of, classify
from ivegan.evaluation.report import PREFIX, Figure, render
from ivegan.networks import sample_shape
from ivegan.order import modes
from ivegan.transforms import to_float, to_uint8, transform

log = logging.getLogger(__name__)

NUM_DRAWS = 4  # of z' for each held-out sample
NUM_POINTS = 2500
PERFECT_SHARE = 1 - float(
    np.exp(-(metrics.HIGH_QUALITY_STDS**2) / 2)
)  # .98889 of a Gaussian's points

_BATCH = 500  # of a forward pass
_TSNE_CODES = 3000  # more of them take minutes and show the same
_PIXEL_SIDE = 32  # of the images that the raw-pixel baselines see

# What a stream of random numbers is for: no two share one.
_PRIOR, _VARIATIONS, _TRANSFORM, _DATA, _PICTURES = range(5)


@dataclass(frozen=True)
class _Model:
    """E and G of a checkpoint on a device, called with arrays of any length."""

    config: Config
    encoder: nn.Module
    generator: nn.Module
    device: torch.device

    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Return E(x) of stored images (n, c, h, w) or points (n, 2), float32."""
        codes = [self._encode(part) for part in _cut(samples)]
        out = np.concatenate(codes)
        if not np.isfinite(out).all():
            raise UserError("Some codes are not finite: the encoder of this checkpoint diverged.")
        return out

    def generate(self, noise: Tensor, z: Tensor) -> np.ndarray:
        """Return G(z', z) as stored images, uint8, or as points."""
        return np.concatenate(list(self.batches(noise, z)))

    def batches(self, noise: Tensor, z: Tensor) -> Iterator[np.ndarray]:
        """Yield G(z', z) piece by piece, for more images than fit in memory."""
        for part, code in zip(noise.split(_BATCH), z.split(_BATCH), strict=True):
            yield self._generate(part, code)

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Return draws of z', (count, noise_dim)."""
        return torch.randn(count, self.config.model.noise_dim, generator=generator)

    def prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Return draws of z, uniform on (-1, 1), (count, z_dim)."""
        return 2 * torch.rand(count, self.config.model.z_dim, generator=generator) - 1

    @torch.no_grad()
    def _encode(self, samples: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.array(samples)).to(self.device)
        return self.encoder(x if self.config.is_points else to_float(x)).cpu().numpy()

    @torch.no_grad()
    def _generate(self, noise: Tensor, z: Tensor) -> np.ndarray:
        made = self.generator(noise.to(self.device), z.to(self.device))
        if not torch.isfinite(made).all():
            raise UserError("The generator of this checkpoint diverged: it makes no numbers.")
        return (made if self.config.is_points else to_uint8(made)).cpu().numpy()


def evaluate(
    checkpoint_uri: str,
    data_uri: str | None,
    out_dir: str | Path,
    *,
    cache_dir: str | Path,
    device: str | torch.device = "cpu",
    seed: int = 0,
    limit: int | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint, write ``metrics.json``, PNGs and ``report.html``, return what they say.

    Args:
        checkpoint_uri: a checkpoint's folder, or a run's, of which the newest is taken.
        data_uri: shards; those that the checkpoint was trained on where None; unused for points.
        out_dir: made if needed; files of the same names are replaced.
        cache_dir: for decoded images and the trained classifier.
        device: where E and G run.
        seed: of every draw.
        limit: held-out samples at most, evenly spread over the split.

    Returns:
        ``metrics`` (floats under ``eval/same_class`` and the like, explained in ``report``),
        ``facts`` (checkpoint, data, settings), ``figures`` (paths by name), ``report`` (a path).

    Raises:
        UserError: no checkpoint, data of another shape, or networks that diverged.
    """
    if limit is not None and limit < 2:
        raise UserError(f"limit is {limit}, but must be at least 2.")
    uri = checkpoint.find(checkpoint_uri)
    config, encoder, generator, about = checkpoint.load_networks(uri)
    device = torch.device(device)
    model = _Model(config, encoder.to(device), generator.to(device), device)
    facts = {
        "dataset": config.dataset,
        "images_seen": about["images_seen"],
        "checkpoint": uri,
        "run_id": about.get("run_id"),
        "preset": about.get("preset"),
        "mlflow_run_id": about.get("mlflow_run_id"),
        "git_commit": about.get("git_commit"),
        "dataset_hash": about.get("dataset_hash"),
        "seed": seed,
        "config": about["config"],
    }
    if config.is_points:
        found, pages, evaluated = _points(model, uri, seed, limit or NUM_POINTS)
    else:
        where = data_uri or about.get("data")
        if not where:
            raise UserError(f"The checkpoint {uri} does not say where its data are: give --data.")
        facts["data"] = where
        facts["evaluated_dataset_hash"] = read_manifest(where).hash
        found, pages, evaluated = _images(model, where, Path(cache_dir), seed, limit)
    facts["evaluated"] = evaluated
    found = {PREFIX + name: value for name, value in found.items()}
    return _write(Path(out_dir), found, facts, pages)


def quality(
    config: Config,
    encoder: nn.Module,
    generator: nn.Module,
    data_uri: str | None,
    cache_dir: str | Path,
    *,
    seed: int = 0,
    limit: int | None = None,
) -> dict[str, float]:
    """Return ``quality``, one number in [0, 1] to choose between runs by, and its parts.

    They are better the larger they are, and quality is the mean of three: one each for variations,
    for codes or modes, and for samples. Images, of the validation split: ``same_class`` after
    reconstruction, ``one_nn`` accuracy of codes (``same_attributes`` and ``probe_auroc`` for
    faces), and ``near``, the Fréchet distance's floor over itself; beside these ``frechet``, the
    distance, better the smaller it is. Points: ``right_mode`` of
    variations, ``coverage``, exp(-reverse KL) over all samples, which is the share of modes
    reached, and ``high_quality``, the share of samples near a mode over a perfect sampler's.

    Args:
        config: of the run.
        encoder, generator: in eval mode.
        data_uri: shards; None for points.
        cache_dir: for decoded images and the trained classifier.
        seed: of every draw.
        limit: validation images, and five times as many of the train split, that are looked at;
            all by default. For searches, which score often.
    """
    device = next(generator.parameters()).device
    model = _Model(config, encoder, generator, device)
    if config.is_points:
        x, _, prior, x_hat = _drawn_points(model, NUM_POINTS, seed)
        found = metrics.mixture(prior, config.dataset)
        return _with_mean(
            {
                "right_mode": metrics.reconstructed_points(x, x_hat, config.dataset)["right_mode"],
                "coverage": float(np.exp(-found["reverse_kl_all"])),
                "high_quality": min(found["high_quality"] / PERFECT_SHARE, 1.0),
            }
        )
    assert data_uri is not None, "images come with their data"
    sets = _load(config, data_uri, "valid", Path(cache_dir), limit)
    known = _some(len(sets.train), None if limit is None else 5 * limit)
    train, train_labels = model.encode(sets.train[known]), sets.train_labels[known]
    codes = model.encode(sets.x)
    found = _generation(model, sets, codes, Path(cache_dir), seed, known)
    parts = {"near": min(1.0, found["frechet_floor"] / max(found["frechet"], 1e-12))}
    if sets.labels.ndim == 1:
        parts["same_class"] = found["same_class"]
        parts["one_nn"] = metrics.nearest_neighbour_accuracy(
            train, train_labels, codes, sets.labels
        )
    else:
        parts["same_attributes"] = found["same_attributes"]
        parts["probe_auroc"] = metrics.attribute_probe_auroc(
            train, train_labels, codes, sets.labels
        )
    return {**_with_mean(parts), "frechet": found["frechet"]}


def _with_mean(parts: dict[str, float]) -> dict[str, float]:
    return {"quality": sum(parts.values()) / len(parts), **parts}


def _write(
    out: Path, found: dict[str, float], facts: dict[str, Any], pages: list[Figure]
) -> dict[str, Any]:
    """Write all files of an evaluation and return its summary."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {page.name: out / f"{page.name}.png" for page in pages}
    for page in pages:
        paths[page.name].write_bytes(figures.png(page.image))
    text = json.dumps({"metrics": found, "facts": facts}, indent=2, allow_nan=False) + "\n"
    (out / "metrics.json").write_text(text)
    report = out / "report.html"
    report.write_text(render(found, facts, pages), encoding="utf-8")
    return {
        "metrics": found,
        "facts": facts,
        "figures": {name: str(path) for name, path in paths.items()},
        "report": str(report),
    }


# --- Points -------------------------------------------------------------------------------------


def _points(
    model: _Model, uri: str, seed: int, count: int
) -> tuple[dict[str, float], list[Figure], int]:
    """Return numbers, figures and count for ``ring`` and ``grid``."""
    dataset = model.config.dataset
    means, std = modes(dataset)
    x, z, prior, x_hat = _drawn_points(model, count, seed)
    of_variations = metrics.mixture(x_hat[0], dataset)
    found = {
        **metrics.mixture(prior, dataset),
        **metrics.reconstructed_points(x, x_hat, dataset),
        **{f"recon_{name}": of_variations[name] for name in ("modes", "high_quality", "std_ratio")},
        "modes_total": float(len(means)),
        "right_mode_chance": 1 / len(means),
        # The mean over multinomial draws of this many samples, to first order.
        "reverse_kl_floor": (len(means) - 1) / (2 * count),
    }
    seen = checkpoint.read_facts(uri)["images_seen"]
    panels = [("true data", x), *_history(model, uri, count, seed)]
    panels += [(f"variations at {_short(seen)}", x_hat[0])]
    unit = "radius 1" if dataset == "ring" else "spacing 2"
    labels, _ = metrics.nearest_modes(x, dataset)
    names = [f"mode {i + 1}" for i in range(len(means))]
    if dataset == "grid":
        labels, names = labels // 5, [f"row {i + 1}" for i in range(5)]
    pages = [
        Figure(
            "density",
            figures.density(
                panels,
                dataset,
                f"The {dataset}, learned",
                note="Samples from the prior, G(z', z), after so many training samples; "
                "then variations G(z', E(x))",
            ),
            f"Fig. 2 of the paper, scaled to {unit}. Every dot of the true data should be there, "
            "equally dark, with nothing between them.",
        ),
        Figure(
            "closeup",
            figures.closeup(
                [
                    ("true data", _offsets(x, dataset)),
                    ("samples, G(z', z)", _offsets(prior, dataset)),
                    ("variations, G(z', E(x))", _offsets(x_hat[0], dataset)),
                    ("G(z', E(x)) - x", (x_hat[0] - x) / std),
                ],
                "All modes laid over each other",
                note="Circles at 1, 2 and 3 standard deviations of the data",
            ),
            "A perfect sampler fills the three circles as the true data do. Variations should be "
            "wider by a factor of 1.22, and their distance from x narrower, by .71: that is T.",
        ),
    ]
    if model.config.model.z_dim in (2, 3):
        pages.append(
            Figure(
                "latent",
                figures.scatter(z.numpy(), labels, names, "Codes E(x), coloured by mode"),
                "The latent space itself. Samples of one mode should share one place.",
            )
        )
    return found, pages, count


def _drawn_points(
    model: _Model, count: int, seed: int
) -> tuple[np.ndarray, Tensor, np.ndarray, np.ndarray]:
    """Return x (n, 2), its codes (n, z_dim), prior samples (n, 2) and variations (k, n, 2)."""
    x = _mixture(model.config.dataset, count, seed)
    z = torch.from_numpy(model.encode(x))
    draws = _generator(seed, _VARIATIONS)
    x_hat = np.stack([model.generate(model.noise(count, draws), z) for _ in range(NUM_DRAWS)])
    return x, z, _prior_points(model, count, seed), x_hat


def _mixture(dataset: str, count: int, seed: int) -> np.ndarray:
    """Return true points, float32, none of which training has seen."""
    means, std = modes(dataset)
    rng = np.random.default_rng((seed, _DATA))
    which = rng.integers(len(means), size=count)
    return (means[which] + std * rng.standard_normal((count, 2))).astype(np.float32)


def _prior_points(model: _Model, count: int, seed: int) -> np.ndarray:
    draws = _generator(seed, _PRIOR)
    z = model.prior(count, draws)
    return model.generate(model.noise(count, draws), z)


def _history(model: _Model, uri: str, count: int, seed: int) -> list[tuple[str, np.ndarray]]:
    """Return prior samples of at most six checkpoints of the run, up to this one."""
    run_uri, _, _ = uri.rpartition("/")
    siblings = [other for other in checkpoint.checkpoints(run_uri) if other <= uri] or [uri]
    chosen = np.unique(np.linspace(0, len(siblings) - 1, 6).round().astype(int))
    panels = []
    for sibling in (siblings[i] for i in chosen):
        config, encoder, generator, about = checkpoint.load_networks(sibling)
        then = _Model(config, encoder.to(model.device), generator.to(model.device), model.device)
        panels.append((_short(about["images_seen"]), _prior_points(then, count, seed)))
    return panels


def _offsets(points: np.ndarray, dataset: str) -> np.ndarray:
    """Return each point's offset from its nearest mode in stds."""
    means, std = modes(dataset)
    nearest, _ = metrics.nearest_modes(points, dataset)
    return (points - means[nearest]) / std


# --- Images -------------------------------------------------------------------------------------


class _Data(NamedTuple):
    """What images are judged on."""

    train: np.ndarray
    train_labels: np.ndarray
    x: np.ndarray
    """Held-out images, all or some."""
    labels: np.ndarray
    """Of x: classes (n,), or 0/1 attributes (n, a)."""
    hash: str
    """Of the whole data set."""


def _images(
    model: _Model, data_uri: str, cache_dir: Path, seed: int, limit: int | None
) -> tuple[dict[str, float], list[Figure], int]:
    """Return numbers, figures and count for images, judged on the test split."""
    sets = _load(model.config, data_uri, "test", cache_dir, limit)
    count = len(sets.x)
    log.info("encoding %s train and %s test images", f"{len(sets.train):,}", f"{count:,}")
    codes, train_codes = model.encode(sets.x), model.encode(sets.train)
    found = {
        **_generation(model, sets, codes, cache_dir, seed),
        **_probes(train_codes, sets.train_labels, codes, sets.labels, seed),
        **_pixel_baselines(sets, cache_dir, seed),
        **_invariance(model, sets.x, codes, seed),
    }
    log.info("drawing figures")
    names = read_manifest(data_uri).label_names
    return found, _pictures(model, sets, codes, list(names), seed), count


def _load(config: Config, data_uri: str, split: str, cache_dir: Path, limit: int | None) -> _Data:
    """Return train and held-out images.

    Raises:
        UserError: images of another shape than the networks take.
    """
    shape, wanted = read_manifest(data_uri).image_shape, sample_shape(config.model)
    if tuple(shape) != wanted:
        raise UserError(
            f"The images of {data_uri} are {tuple(shape)}, but the checkpoint's networks take "
            f"{wanted}; give the data set that it was trained on."
        )
    train = load_split(data_uri, "train", cache_dir)
    test = load_split(data_uri, split, cache_dir)
    here = _some(len(test.images), limit)
    x, labels = test.images[here], test.labels[here]
    return _Data(train.images, train.labels, x, labels, train.dataset_hash)


def _some(total: int, limit: int | None) -> slice | np.ndarray:
    """Return which of so many images are looked at."""
    # A slice leaves the images where they are, in the memory-mapped file.
    return slice(None) if limit is None or limit >= total else _spread(total, limit)


def _generation(
    model: _Model,
    sets: _Data,
    codes: np.ndarray,
    cache_dir: Path,
    seed: int,
    known: slice | np.ndarray = slice(None),
) -> dict[str, float]:
    """Return what the classifier says of samples and variations, beside the known train images."""
    judge = classifier_of(sets.train, sets.train_labels, sets.hash, cache_dir).to(model.device)
    _, real = _judged(judge, _cut(sets.train[known]))
    seen, held_out = _judged(judge, _cut(sets.x))
    count = len(sets.x)
    log.info("judging %s samples and %s variations", f"{count:,}", f"{NUM_DRAWS * count:,}")
    draws = _generator(seed, _PRIOR)
    z = model.prior(count, draws)
    _, fake = _judged(judge, model.batches(model.noise(count, draws), z))
    draws, z = _generator(seed, _VARIATIONS), torch.from_numpy(codes)
    variations = [model.batches(model.noise(count, draws), z) for _ in range(NUM_DRAWS)]
    predicted = np.stack([_judged(judge, images)[0] for images in variations])
    classes = sets.labels.ndim == 1
    agreement = metrics.label_agreement if classes else metrics.attribute_agreement
    name = "same_class" if classes else "same_attributes"
    same, by_chance = agreement(sets.labels, predicted)
    return {
        name: same,
        f"{name}_shuffled": by_chance,
        "classifier_accuracy": agreement(sets.labels, seen[None])[0],
        "frechet": metrics.frechet_distance(fake, real),
        "frechet_floor": metrics.frechet_distance(held_out, real),
    }


def _judged(judge: Classifier, batches: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the classifier's labels and features of images that come in batches."""
    labels, features = zip(*(classify(judge, batch) for batch in batches), strict=True)
    return np.concatenate(labels), np.concatenate(features)


def _probes(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, labels: np.ndarray, seed: int
) -> dict[str, float]:
    """Return what can be read off codes, or off pixels: accuracy of probes and of clusters."""
    if labels.ndim == 2:
        return {"attribute_auroc": metrics.attribute_probe_auroc(train, train_labels, test, labels)}
    nmi, accuracy = metrics.clustering(test, labels, seed=seed)
    return {
        "one_nn": metrics.nearest_neighbour_accuracy(train, train_labels, test, labels),
        "linear_probe": metrics.linear_probe_accuracy(train, train_labels, test, labels),
        "kmeans_nmi": nmi,
        "kmeans_accuracy": accuracy,
        "majority": float(np.bincount(labels).max() / len(labels)),
    }


def _pixel_baselines(sets: _Data, cache_dir: Path, seed: int) -> dict[str, float]:
    """Return the same probes on raw pixels, which depend on the data alone: kept in the cache."""
    about = f"{sets.hash} {len(sets.x)} {seed} {_PIXEL_SIDE}"
    path = cache_dir / f"pixels-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_bytes())
    log.info("probing raw pixels for comparison, once per data set")
    train, x = _pixels(sets.train), _pixels(sets.x)
    found = _probes(train, sets.train_labels, x, sets.labels, seed)
    found = {f"{name}_pixels": value for name, value in found.items() if name != "majority"}
    storage.write_bytes(path, json.dumps(found).encode())
    return found


def _pixels(images: np.ndarray) -> np.ndarray:
    """Return images as rows of floats, averaged down where they are large."""
    parts = []
    for part in _cut(images):
        small = to_float(torch.from_numpy(np.array(part)))
        if small.shape[-1] > _PIXEL_SIDE:
            small = adaptive_avg_pool2d(small, _PIXEL_SIDE)
        parts.append(small.flatten(1).numpy())
    return np.concatenate(parts)


def _invariance(model: _Model, x: np.ndarray, codes: np.ndarray, seed: int) -> dict[str, float]:
    """Return whether E ignores T, and whether z' replaces it."""
    draws = _generator(seed, _TRANSFORM)
    moved = np.concatenate([model.encode(_transformed(model, part, draws)) for part in _cut(x)])
    few = slice(0, 512)  # variances need no more
    transformed = np.stack([_transformed(model, x[few], draws) for _ in range(NUM_DRAWS)])
    z = torch.from_numpy(codes[few])
    made = np.stack([model.generate(model.noise(len(z), draws), z) for _ in range(NUM_DRAWS)])
    return {
        "retrieval": metrics.retrieval_accuracy(codes, moved),
        "retrieval_chance": 1 / len(x),
        "variation_ratio": metrics.variation_ratio(
            made.astype(np.float32), transformed.astype(np.float32)
        ),
    }


def _transformed(model: _Model, images: np.ndarray, draws: torch.Generator) -> np.ndarray:
    """Return T(x) of stored images, as stored images."""
    x = to_float(torch.from_numpy(np.array(images)))
    uniform = torch.rand(len(x), 7, generator=draws)
    return to_uint8(transform(x, uniform, model.config.transform)).numpy()


def _pictures(
    model: _Model, sets: _Data, codes: np.ndarray, names: list[str], seed: int
) -> list[Figure]:
    """Return the paper's figures for images."""
    x, labels = sets.x, sets.labels
    draws = _generator(seed, _PICTURES)
    columns = 10 if x.shape[-1] > 64 else 12
    count = columns * (6 if x.shape[-1] > 64 else 8)
    z = model.prior(count, draws)
    samples = model.generate(model.noise(count, draws), z)
    chosen = _one_of_each(labels, columns)
    known = torch.from_numpy(codes[chosen])
    variations = [model.generate(model.noise(len(chosen), draws), known) for _ in range(4)]
    transformed = [_transformed(model, x[chosen], draws) for _ in range(2)]
    return [
        Figure(
            "samples",
            figures.sample_grid(
                samples,
                "Samples from the prior, G(z', z)",
                note="z uniform, z' normal",
                columns=columns,
            ),
            "Fig. 3 of the paper. New images, from no original: they should look like the data and "
            "differ from each other.",
        ),
        Figure(
            "reconstructions",
            figures.reconstruction_rows(
                x[chosen],
                np.stack(transformed),
                np.stack(variations),
                "Originals, transformations and variations",
                note="Held-out images; each row of variations has other z'",
            ),
            "Figs. 4 and 6 of the paper. Variations G(z', E(x)) should show what x shows, moved "
            "about as T(x) moves it.",
        ),
        _latent(labels, codes, names, seed),
        _interpolation(model, x, codes, chosen),
        _same_noise(model, draws, columns),
    ]


def _interpolation(model: _Model, x: np.ndarray, codes: np.ndarray, chosen: np.ndarray) -> Figure:
    """Return rows from one original to another, through codes on the line between theirs."""
    first, last = chosen[0:10:2], chosen[1:10:2]
    steps = 8
    shares = torch.linspace(0, 1, steps)[None, :, None]
    a, b = torch.from_numpy(codes[first])[:, None], torch.from_numpy(codes[last])[:, None]
    between = ((1 - shares) * a + shares * b).flatten(0, 1)
    made = model.generate(torch.zeros(len(between), model.config.model.noise_dim), between)
    made = made.reshape(len(first), steps, *x.shape[1:])
    rows = np.concatenate((x[first][:, None], made, x[last][:, None]), axis=1)
    return Figure(
        "interpolation",
        figures.image_rows(
            rows,
            "From one original to another",
            note="First and last: originals. Between: G(0, z), z on the line from code to code",
            column_breaks=(1, steps + 1),
        ),
        "Fig. 9 of the paper. Each row should change smoothly, and look like data all the way.",
    )


def _same_noise(model: _Model, draws: torch.Generator, columns: int) -> Figure:
    """Return a table of five z' against as many z as there are columns."""
    noise, z = model.noise(5, draws), model.prior(columns, draws)
    made = model.generate(noise.repeat_interleave(columns, 0), z.repeat(5, 1))
    return Figure(
        "variations",
        figures.image_rows(
            made.reshape(5, columns, *made.shape[1:]),
            "One z per column, one z' per row",
            note="Samples from the prior",
        ),
        "Fig. 7 of the paper. A column should show one object, a row one way to shift and turn it.",
    )


def _latent(labels: np.ndarray, codes: np.ndarray, names: list[str], seed: int) -> Figure:
    """Return the codes as points: as they are in two or three dimensions, by t-SNE otherwise."""
    if labels.ndim == 2:
        labels, names = _rarest(labels, names)
    dims = codes.shape[1]
    title, note = "Codes E(x), coloured by label", f"{dims} dimensions, as they are"
    if dims not in (2, 3):
        from sklearn.manifold import TSNE

        few = _spread(len(codes), min(_TSNE_CODES, len(codes)))
        labels, codes = labels[few], codes[few]
        perplexity = min(30.0, (len(codes) - 1) / 3)
        codes = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(codes)
        title = "Codes E(x), coloured by label, projected by t-SNE"
        note = f"{dims} dimensions shown in 2: who is near whom counts, distances do not"
    return Figure(
        "latent",
        figures.scatter(codes, labels, names, title, note=note, axes=dims in (2, 3)),
        "Figs. 5 and 8 of the paper. E has never seen a label; what has the same one should lie "
        "together.",
    )


def _rarest(attributes: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return each sample's first attribute among the four that Fig. 8 colours, or -1."""
    wanted = [n for n in ("Eyeglasses", "Wearing_Hat", "Bangs", "Blond_Hair") if n in names]
    wanted = wanted or names[:4]
    columns = attributes[:, [names.index(name) for name in wanted]]
    return np.where(columns.any(axis=1), columns.argmax(axis=1), -1), wanted


def _one_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Return indices of samples for a picture, class by class in turn."""
    if labels.ndim == 2:
        return np.arange(min(count, len(labels)))
    order = np.concatenate([np.flatnonzero(labels == c)[:count] for c in np.unique(labels)])
    turn = np.concatenate([np.arange(np.sum(labels[order] == c)) for c in np.unique(labels)])
    return order[np.lexsort((labels[order], turn))][:count]


# --- Small things -------------------------------------------------------------------------------


def _generator(seed: int, purpose: int) -> torch.Generator:
    state = np.random.SeedSequence((seed, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _cut(samples: np.ndarray) -> Iterator[np.ndarray]:
    """Yield samples batch by batch."""
    for start in range(0, len(samples), _BATCH):
        yield samples[start : start + _BATCH]


def _spread(total: int, count: int) -> np.ndarray:
    """Return so many indices, evenly spread."""
    return np.linspace(0, total - 1, count).round().astype(int)


def _short(images: int) -> str:
    """Return a count as "51.2 M samples"."""
    for size, letter in ((10**6, " M"), (10**3, " k")):
        if images >= size:
            return f"{images / size:.3g}{letter} samples"
    return f"{images} samples"
