"""Measures and figures of a checkpoint trained on points, ``ring`` or ``grid``."""

import numpy as np
import torch
from torch import Tensor

from ivegan import checkpoint, order
from ivegan.config import PROTOCOLS, Protocol
from ivegan.evaluation import figures, mixtures, plots
from ivegan.evaluation.report import Figure
from ivegan.evaluation.sampling import DATA, FLOOR, NUM_DRAWS, VARIATIONS, Sampler, stream

_FLOOR_DRAWS = 20  # of a perfect sampler
_FLOORS = ("modes", "high_quality", "reverse_kl", "reverse_kl_all", "std_ratio")
PERFECT_SHARE = 1 - float(np.exp(-(mixtures.HIGH_QUALITY_STDS**2) / 2))
"""High quality of a perfect sampler, 0.98889."""


def evaluate(
    sampler: Sampler, uri: str, seed: int, count: int, protocol: Protocol
) -> tuple[dict[str, float], list[Figure]]:
    """Return metrics of so many points, and figures with the older checkpoints of the run."""
    dataset = sampler.config.dataset
    num_modes = len(order.modes(dataset)[0])
    x, z, prior, x_hat = _draw(sampler, count, seed, protocol)
    of_variations = mixtures.mixture(x_hat[0], dataset, protocol)
    names = ("modes", "high_quality", "std_ratio")
    result = {
        **_of_samples(prior, dataset, seed, protocol),
        **_of_variations(sampler, x, x_hat, protocol),
        **{f"recon_{name}": of_variations[name] for name in names},
        "modes_total": float(num_modes),
        "right_mode_chance": 1 / num_modes,
    }
    panels = [("true data", x), *_history(sampler, uri, count, seed)]
    panels += [(f"variations at {_short(checkpoint.read_metadata(uri)['images_seen'])}", x_hat[0])]
    pages = [_density(panels, dataset), _closeup(x, prior, x_hat[0], dataset, protocol)]
    if sampler.config.model.z_dim in (2, 3):
        pages.append(_latent(z.numpy(), x, dataset))
    return result, pages


def perfect(dataset: str, count: int, seed: int, protocol: Protocol) -> dict[str, float]:
    """Return the mean scores of a perfect sampler, which no sampler beats in the long run."""
    draws = stream(seed, FLOOR)
    samples = [order.sample_points(dataset, count, draws, protocol) for _ in range(_FLOOR_DRAWS)]
    scores = [mixtures.mixture(points.numpy(), dataset, protocol) for points in samples]
    return {f"{name}_floor": float(np.mean([s[name] for s in scores])) for name in _FLOORS}


def measure(sampler: Sampler, seed: int) -> dict[str, float]:
    """Return the numbers of an evaluation; of samples alone where there is no encoder."""
    dataset, protocol = sampler.config.dataset, PROTOCOLS[sampler.config.protocol]
    if sampler.encoder is None:
        samples = sampler.prior_samples(protocol.samples, seed)
        return _of_samples(samples, dataset, seed, protocol)
    x, _, prior, x_hat = _draw(sampler, protocol.samples, seed, protocol)
    samples = _of_samples(prior, dataset, seed, protocol)
    return samples | _of_variations(sampler, x, x_hat, protocol)


def _of_samples(
    samples: np.ndarray, dataset: str, seed: int, protocol: Protocol
) -> dict[str, float]:
    scores = mixtures.mixture(samples, dataset, protocol)
    return scores | perfect(dataset, len(samples), seed, protocol)


def _of_variations(
    sampler: Sampler, x: np.ndarray, x_hat: np.ndarray, protocol: Protocol
) -> dict[str, float]:
    dataset, noise_std = sampler.config.dataset, sampler.config.transform.noise_std
    return mixtures.reconstructed_points(x, x_hat, dataset, protocol, noise_std)


def quality(sampler: Sampler, seed: int) -> dict[str, float]:
    """Return the components of ``quality``, each in [0, 1]."""
    dataset, protocol = sampler.config.dataset, PROTOCOLS[sampler.config.protocol]
    x, _, prior, x_hat = _draw(sampler, protocol.samples, seed, protocol)
    samples = mixtures.mixture(prior, dataset, protocol)
    return {
        "right_mode": _of_variations(sampler, x, x_hat, protocol)["right_mode"],
        "coverage": float(np.exp(-samples["reverse_kl_all"])),
        "high_quality": min(samples["high_quality"] / PERFECT_SHARE, 1.0),
    }


def true_points(
    dataset: str, count: int, seed: int, protocol: Protocol = PROTOCOLS["pacgan"]
) -> np.ndarray:
    """Return true points, float32, none of which training has seen."""
    return order.sample_points(dataset, count, stream(seed, DATA), protocol).numpy()


def _draw(
    sampler: Sampler, count: int, seed: int, protocol: Protocol
) -> tuple[np.ndarray, Tensor, np.ndarray, np.ndarray]:
    """Return x (n, 2), its codes (n, z_dim), prior samples (n, 2) and variations (k, n, 2)."""
    x = true_points(sampler.config.dataset, count, seed, protocol)
    z, x_hat = variations(sampler, x, seed)
    return x, z, sampler.prior_samples(count, seed), x_hat


def variations(sampler: Sampler, x: np.ndarray, seed: int) -> tuple[Tensor, np.ndarray]:
    """Return the codes (n, z_dim) and variations (k, n, 2) of points (n, 2)."""
    z, draws = torch.from_numpy(sampler.encode(x)), stream(seed, VARIATIONS)
    noise = (sampler.noise(len(x), draws) for _ in range(NUM_DRAWS))
    return z, np.stack([sampler.generate(one, z) for one in noise])


def _history(sampler: Sampler, uri: str, count: int, seed: int) -> list[tuple[str, np.ndarray]]:
    """Return prior samples of at most six checkpoints of the run, up to this one."""
    run_uri, _, _ = uri.rpartition("/")
    siblings = [other for other in checkpoint.checkpoints(run_uri) if other <= uri] or [uri]
    chosen = np.unique(np.linspace(0, len(siblings) - 1, 6).round().astype(int))
    panels = []
    for sibling in (siblings[i] for i in chosen):
        config, encoder, generator, metadata = checkpoint.load_networks(sibling)
        device = sampler.device
        older = Sampler(config, encoder.to(device), generator.to(device), device)
        panels.append((_short(metadata["images_seen"]), older.prior_samples(count, seed)))
    return panels


def _density(panels: list[tuple[str, np.ndarray]], dataset: str) -> Figure:
    note = (
        "Samples from the prior, G(z', z), after so many training samples; "
        "then variations G(z', E(x))"
    )
    unit = "radius 1" if dataset == "ring" else "spacing 2"
    return Figure(
        "density",
        figures.density(panels, dataset, f"The {dataset}, learned", note=note),
        f"Fig. 2 of the paper, scaled to {unit}. Every dot of the true data should be there, "
        "equally dark, with nothing between them.",
    )


def _closeup(
    x: np.ndarray, prior: np.ndarray, x_hat: np.ndarray, dataset: str, protocol: Protocol
) -> Figure:
    means, std = order.modes(dataset, protocol)

    def offsets(points: np.ndarray) -> np.ndarray:
        nearest, _ = mixtures.nearest_modes(points, dataset)
        return (points - means[nearest]) / std

    image = plots.closeup(
        [
            ("true data", offsets(x)),
            ("samples, G(z', z)", offsets(prior)),
            ("variations, G(z', E(x))", offsets(x_hat)),
            ("G(z', E(x)) - x", (x_hat - x) / std),
        ]
    )
    return Figure(
        "closeup",
        image,
        "A perfect sampler fills the three circles as the true data do. Variations should be "
        "wider by a factor of 1.22, and their distance from x narrower, by 0.71: that is T.",
    )


def _latent(codes: np.ndarray, x: np.ndarray, dataset: str) -> Figure:
    labels, _ = mixtures.nearest_modes(x, dataset)
    names = [f"mode {i + 1}" for i in range(8)]
    if dataset == "grid":
        labels, names = labels // 5, [f"row {i + 1}" for i in range(5)]
    return Figure(
        "latent",
        plots.scatter(codes, labels, names, "Codes E(x), coloured by mode"),
        "The latent space itself. Samples of one mode should share one place.",
    )


def _short(images: int) -> str:
    """Return a count as "51.2 M samples"."""
    for size, letter in ((10**6, " M"), (10**3, " k")):
        if images >= size:
            return f"{images / size:.3g}{letter} samples"
    return f"{images} samples"
