"""The paper's figures of a checkpoint trained on images."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ivegan.evaluation import figures, plots
from ivegan.evaluation.report import Figure
from ivegan.evaluation.sampling import PICTURES, Sampler, evenly, stream

if TYPE_CHECKING:
    from ivegan.evaluation.images import Split

_TSNE_CODES = 3000  # more of them take minutes and give the same picture
# Of Fig. 8, rarest first, so that an image with several is coloured by the rarest.
_ATTRIBUTES = ("Eyeglasses", "Wearing_Hat", "Bangs", "Blond_Hair")


def draw(sampler: Sampler, split: "Split", codes: np.ndarray, seed: int) -> list[Figure]:
    """Return all figures.

    Args:
        sampler: the checkpoint's networks.
        split: the held-out images.
        codes: of these.
        seed: of every draw.
    """
    draws = stream(seed, PICTURES)
    columns = 10 if split.x.shape[-1] > 64 else 12
    samples = _samples(sampler, draws, columns, rows=6 if split.x.shape[-1] > 64 else 8)
    chosen = one_of_each(split.labels, columns)
    return [
        samples,
        _reconstructions(sampler, split.x[chosen], codes[chosen], draws),
        latent(split.labels, codes, split.label_names, seed),
        _interpolation(sampler, split.x[chosen], codes[chosen]),
        _table(sampler, draws, columns),
    ]


def _samples(sampler: Sampler, draws: torch.Generator, columns: int, rows: int) -> Figure:
    z = sampler.prior(columns * rows, draws)
    images = sampler.generate(sampler.noise(len(z), draws), z)
    title, note = "Samples from the prior, G(z', z)", "z uniform, z' normal"
    return Figure(
        "samples",
        figures.sample_grid(images, title, note=note, columns=columns),
        "Fig. 3 of the paper. New images, from no original: they should look like the data and "
        "differ from each other.",
    )


def _reconstructions(
    sampler: Sampler, x: np.ndarray, codes: np.ndarray, draws: torch.Generator
) -> Figure:
    z = torch.from_numpy(codes)
    variations = [sampler.generate(sampler.noise(len(x), draws), z) for _ in range(4)]
    transformed = [sampler.transformed(x, draws) for _ in range(2)]
    return Figure(
        "reconstructions",
        figures.reconstruction_rows(
            x,
            np.stack(transformed),
            np.stack(variations),
            "Originals, transformations and variations",
            note="Held-out images; each row of variations has other z'",
        ),
        "Figs. 4 and 6 of the paper. Variations G(z', E(x)) should show what x shows, moved "
        "about as T(x) moves it.",
    )


def _interpolation(sampler: Sampler, x: np.ndarray, codes: np.ndarray) -> Figure:
    """Return rows from one original to another, through codes on the line between theirs."""
    steps, pairs = 8, min(10, len(x)) // 2
    first, last = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    shares = torch.linspace(0, 1, steps)[None, :, None]
    a, b = torch.from_numpy(codes[first])[:, None], torch.from_numpy(codes[last])[:, None]
    between = ((1 - shares) * a + shares * b).flatten(0, 1)
    images = sampler.generate(torch.zeros(len(between), sampler.config.model.noise_dim), between)
    images = images.reshape(pairs, steps, *x.shape[1:])
    rows = np.concatenate((x[first][:, None], images, x[last][:, None]), axis=1)
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


def _table(sampler: Sampler, draws: torch.Generator, columns: int) -> Figure:
    """Return a table of five z' against as many z as there are columns."""
    noise, z = sampler.noise(5, draws), sampler.prior(columns, draws)
    images = sampler.generate(noise.repeat_interleave(columns, 0), z.repeat(5, 1))
    return Figure(
        "variations",
        figures.image_rows(
            images.reshape(5, columns, *images.shape[1:]),
            "One z per column, one z' per row",
            note="Samples from the prior",
        ),
        "Fig. 7 of the paper. A column should show one object, a row one way to shift and turn it.",
    )


def latent(labels: np.ndarray, codes: np.ndarray, names: list[str], seed: int) -> Figure:
    """Return the codes as points: as they are in two or three dimensions, by t-SNE otherwise."""
    if labels.ndim == 2:
        labels, names = rarest(labels, names)
    dims = codes.shape[1]
    title, note = "Codes E(x), coloured by label", f"{dims} dimensions, as they are"
    if dims not in (2, 3):
        labels, codes = tsne(labels, codes, seed)
        title = "Codes E(x), coloured by label, projected by t-SNE"
        note = f"{dims} dimensions shown in 2: neighbourhoods count, distances do not"
    return Figure(
        "latent",
        plots.scatter(codes, labels, names, title, note=note, axes=dims in (2, 3)),
        "Figs. 5 and 8 of the paper. E has never seen a label; images of one label should lie "
        "together.",
    )


def tsne(labels: np.ndarray, codes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (labels, positions) of at most 3,000 codes in a plane."""
    from sklearn.manifold import TSNE

    few = evenly(len(codes), min(_TSNE_CODES, len(codes)))
    perplexity = min(30.0, (len(few) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return labels[few], model.fit_transform(codes[few])


def rarest(attributes: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return each sample's first attribute among those that Fig. 8 colours, or -1, and names."""
    shown = [n for n in _ATTRIBUTES if n in names] or names[:4]
    columns = attributes[:, [names.index(name) for name in shown]]
    return np.where(columns.any(axis=1), columns.argmax(axis=1), -1), shown


def one_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Return indices of samples for a picture, class by class in turn."""
    if labels.ndim == 2:
        return np.arange(min(count, len(labels)))
    order = np.concatenate([np.flatnonzero(labels == c)[:count] for c in np.unique(labels)])
    turn = np.concatenate([np.arange(np.sum(labels[order] == c)) for c in np.unique(labels)])
    return order[np.lexsort((labels[order], turn))][:count]
