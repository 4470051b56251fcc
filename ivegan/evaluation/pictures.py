"""The paper's figures of a checkpoint trained on images."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ivegan.evaluation import figures, metrics, plots
from ivegan.evaluation.report import Figure
from ivegan.evaluation.sampling import FITTED, PICTURES, Sampler, evenly, pixels, stream

if TYPE_CHECKING:
    from ivegan.evaluation.images import EvaluationData

_TSNE_CODES = 3000  # more of them take minutes and give the same picture
# Of Fig. 8, rarest first, so that an image with several is coloured by the rarest.
_ATTRIBUTES = ("Eyeglasses", "Wearing_Hat", "Bangs", "Blond_Hair", "Male")


def draw(
    sampler: Sampler,
    split: "EvaluationData",
    codes: np.ndarray,
    fitted: torch.Tensor,
    seed: int,
) -> tuple[list[Figure], dict[str, float]]:
    """Return all figures, and the purity of the maps of attributes among them.

    ``codes`` are those of the held-out images, ``fitted`` is z from a prior fitted to codes.
    """
    draws = stream(seed, PICTURES)
    columns, rows = (10, 6) if split.x.shape[-1] > 64 else (12, 8)
    chosen = one_of_each(split.labels, columns)
    x, own = split.x[chosen], codes[chosen]
    classes = split.labels.ndim == 1
    shown, purity = (latent if classes else attribute_maps)(split, codes, seed)
    pages = [
        _samples(sampler, sampler.prior(columns * rows, draws), draws, columns),
        _samples(
            sampler, fitted[: columns * rows // 2], stream(seed, FITTED), columns, fitted=True
        ),
        _reconstructions(sampler, x, own, draws),
        shown,
        _interpolation(sampler, x, own),
        _table(sampler, draws, columns),
    ]
    return pages, purity


def _samples(
    sampler: Sampler, z: torch.Tensor, draws: torch.Generator, columns: int, fitted: bool = False
) -> Figure:
    images = sampler.generate(sampler.noise(len(z), draws), z)
    prior = "a prior fitted to the codes" if fitted else "the prior"
    note = "z from a mixture of Gaussians fitted to the codes" if fitted else "z uniform, z' normal"
    return Figure(
        "samples_fitted" if fitted else "samples",
        figures.sample_grid(images, f"Samples from {prior}, G(z', z)", note=note, columns=columns),
        "The same with z from where the codes of train images lie."
        if fitted
        else "Fig. 3 of the paper. New images, from no original: they should look like the data "
        "and differ from each other.",
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


def latent(
    split: "EvaluationData", codes: np.ndarray, seed: int
) -> tuple[Figure, dict[str, float]]:
    """Return the codes of classes as points, by t-SNE where they have more than three entries."""
    labels, dims = split.labels, codes.shape[1]
    title, note = "Codes E(x), coloured by label", f"{dims} dimensions, as they are"
    if dims not in (2, 3):
        few, codes = tsne(codes, seed)
        labels = labels[few]
        title = "Codes E(x), coloured by label, projected by t-SNE"
        note = f"{dims} dimensions shown in 2: neighbourhoods count, distances do not"
    page = plots.scatter(codes, labels, split.label_names, title, note=note, axes=dims in (2, 3))
    caption = "Fig. 5 of the paper. E has never seen a label; images of one label should lie "
    return Figure("latent", page, caption + "together."), {}


def attribute_maps(
    split: "EvaluationData", codes: np.ndarray, seed: int
) -> tuple[Figure, dict[str, float]]:
    """Return t-SNE maps of codes and of pixels side by side, and their purity."""
    colours, names = rarest(split.labels, split.label_names)
    columns = split.labels[:, [split.label_names.index(name) for name in names]]
    panels, purity = [], {}
    kinds = (("codes E(x)", "", codes), ("raw pixels", "_pixels", pixels(split.x)))
    for title, ending, rows in kinds:
        few, positions = tsne(rows, seed)
        panels.append((title, positions, colours[few]))
        purity[f"map_purity{ending}"], chance = metrics.neighbour_purity(positions, columns[few])
        purity["map_purity_chance"] = chance
    caption = "Fig. 8 of the paper. E has never seen an attribute; images that share one should "
    caption += "lie together, more than by their pixels."
    return Figure("latent", plots.maps(panels, names), caption), purity


def tsne(rows: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (indices, positions in a plane) of at most 3,000 rows."""
    from sklearn.manifold import TSNE

    few = evenly(len(rows), min(_TSNE_CODES, len(rows)))
    perplexity = min(30.0, (len(few) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca", random_state=seed)
    return few, model.fit_transform(rows[few])


def rarest(attributes: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return each sample's first attribute among those that Fig. 8 colours, or -1, and names."""
    shown = [n for n in _ATTRIBUTES if n in names] or names[:5]
    columns = attributes[:, [names.index(name) for name in shown]]
    return np.where(columns.any(axis=1), columns.argmax(axis=1), -1), shown


def one_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Return indices of samples for a picture, class by class in turn."""
    if labels.ndim == 2:
        return np.arange(min(count, len(labels)))
    order = np.concatenate([np.flatnonzero(labels == c)[:count] for c in np.unique(labels)])
    turn = np.concatenate([np.arange(np.sum(labels[order] == c)) for c in np.unique(labels)])
    return order[np.lexsort((labels[order], turn))][:count]
