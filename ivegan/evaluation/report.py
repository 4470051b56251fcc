"""The numbers and figures of an evaluation as one HTML file that needs nothing else.

What each number means, and what to compare it with, is defined once, for the page, for the table
that the command prints and for the model card.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from ivegan.config import flatten, from_dict
from ivegan.evaluation.figures import png

PREFIX = "eval/"
"""Of every number's name in ``metrics.json`` and in MLflow."""
_TEMPLATE = Path(__file__).with_name("report.html.j2")


class Figure(NamedTuple):
    """One picture of an evaluation."""

    name: str
    """Of the file, without ``.png``."""
    image: Image.Image
    caption: str
    """What to look for, in a sentence or two."""


@dataclass(frozen=True)
class Meaning:
    """How a number is written, and what to compare it with."""

    title: str
    text: str
    """What the number measures, in one sentence."""
    references: tuple[tuple[str, str | float], ...] = ()
    """(what it is, a constant or the name of another number of the same evaluation)."""
    unit: Literal["percent", "number", "count"] = "percent"
    headline: bool = False
    """Whether it is one of the few at the top of the page."""


_CEILING = ("ceiling, the classifier on x itself", "classifier_accuracy")

MEANINGS: dict[str, Meaning] = {
    "same_class": Meaning(
        "Same class",
        "How often a classifier reads G(z', E(x)) as the class of x: what E keeps, G gives back.",
        (("chance", "same_class_shuffled"), _CEILING),
        headline=True,
    ),
    "same_attributes": Meaning(
        "Same attributes",
        "Balanced accuracy, over all attributes, of a classifier that reads them off G(z', E(x)).",
        (("chance", "same_attributes_shuffled"), _CEILING),
        headline=True,
    ),
    "frechet": Meaning(
        "Fréchet distance",
        "How far samples from the prior are from the train images, in the classifier's features; "
        "smaller is better. Comparable only under the same classifier.",
        (("floor, real test images", "frechet_floor"),),
        unit="number",
        headline=True,
    ),
    "frechet_fitted": Meaning(
        "Fréchet distance, fitted prior",
        "The same with z from a mixture of Gaussians fitted to the codes of train images.",
        (("floor, real test images", "frechet_floor"), ("printed prior", "frechet")),
        unit="number",
    ),
    "frechet_recon": Meaning(
        "Fréchet distance of variations",
        "The same of variations G(z', E(x)) of held-out images.",
        (("floor, real test images", "frechet_floor"),),
        unit="number",
    ),
    "precision": Meaning(
        "Precision",
        "Share of samples among the train images, in the classifier's features.",
        (("fitted prior", "precision_fitted"), ("real test images", "precision_floor")),
    ),
    "recall": Meaning(
        "Recall",
        "Share of train images among the samples.",
        (("fitted prior", "recall_fitted"), ("real test images", "recall_floor")),
    ),
    "density": Meaning(
        "Density",
        "Train images around a sample, over their number around a train image.",
        (("fitted prior", "density_fitted"), ("real test images", "density_floor")),
        unit="number",
    ),
    "coverage": Meaning(
        "Coverage",
        "Share of train images with a sample nearby.",
        (("fitted prior", "coverage_fitted"), ("real test images", "coverage_floor")),
    ),
    "one_nn": Meaning(
        "1-nearest neighbour",
        "How often the nearest train code has the label of a test code.",
        (("raw pixels", "one_nn_pixels"), ("chance", "majority")),
        headline=True,
    ),
    "linear_probe": Meaning(
        "Linear probe",
        "Test accuracy of a logistic regression on the codes.",
        (("raw pixels", "linear_probe_pixels"), ("chance", "majority")),
    ),
    "few_labels": Meaning(
        "Ten labels per class",
        "Test accuracy of the same probe on ten labels per class, mean over five draws of them.",
        (("raw pixels", "few_labels_pixels"), ("chance", "majority")),
    ),
    "kmeans_accuracy": Meaning(
        "k-means accuracy",
        "Accuracy of clusters of test codes, found without labels, matched to classes one to one.",
        (("raw pixels", "kmeans_accuracy_pixels"), ("chance", "majority")),
    ),
    "kmeans_nmi": Meaning(
        "k-means NMI",
        "Information that clusters and classes share: 0 none, 1 all.",
        (("raw pixels", "kmeans_nmi_pixels"), ("chance", 0.0)),
        unit="number",
    ),
    "attribute_auroc": Meaning(
        "Attribute probes",
        "Area under the ROC curve of linear probes on the codes, mean over attributes.",
        (("raw pixels", "attribute_auroc_pixels"), ("chance", 0.5)),
        unit="number",
        headline=True,
    ),
    "attribute_ap": Meaning(
        "Attribute probes, precision",
        "Average precision of these probes, mean over attributes.",
        (("raw pixels", "attribute_ap_pixels"), ("chance", "attribute_ap_chance")),
        unit="number",
    ),
    "attribute_balanced": Meaning(
        "Attribute probes, accuracy",
        "Balanced accuracy of these probes, mean over attributes.",
        (("raw pixels", "attribute_balanced_pixels"), ("chance", 0.5)),
    ),
    "map_purity": Meaning(
        "Purity of the map",
        "How often ten neighbours in the t-SNE map share an image's attribute, mean over five.",
        (("raw pixels", "map_purity_pixels"), ("chance", "map_purity_chance")),
    ),
    "saturation": Meaning(
        "Saturated codes",
        "Share of entries of E(x) beyond 0.99, where Tanh is flat and a code is a bit.",
        (("uniform prior", 0.01),),
    ),
    "retrieval": Meaning(
        "Invariance",
        "How often E(T(x)) is nearest to E(x) among all test codes: whether E ignores T.",
        (
            ("raw pixels", "retrieval_pixels"),
            ("random encoder", "retrieval_random"),
            ("chance", "retrieval_chance"),
        ),
        headline=True,
    ),
    "variation_ratio": Meaning(
        "Variation by z'",
        "How much z' changes an image against how much T does: 0 is a dead z', 1 as much as T.",
        (("goal", 1.0),),
        unit="number",
    ),
    "transform/r2_dx": Meaning(
        "Shift across explained by z'",
        "R² of a linear prediction from z' of the shift across found between x and G(z', E(x)).",
        (("goal", 1.0),),
        unit="number",
    ),
    "transform/r2_dy": Meaning(
        "Shift down explained by z'",
        "R² of a linear prediction from z' of the shift down found between x and G(z', E(x)).",
        (("goal", 1.0),),
        unit="number",
    ),
    "transform/r2_theta": Meaning(
        "Rotation explained by z'",
        "R² of a linear prediction from z' of the rotation found between x and G(z', E(x)).",
        (("goal", 1.0),),
        unit="number",
    ),
    "registered_error": Meaning(
        "Error beside T",
        "Mean squared error of a pixel of G(z', E(x)) to x moved to match it; smaller is better.",
        (
            ("floor, T(x) itself", "registered_error_floor"),
            ("another image", "registered_error_chance"),
        ),
        unit="number",
    ),
    "modes": Meaning(
        "Modes found",
        "Modes that prior samples reach within 3 standard deviations.",
        (("goal", "modes_total"), ("a perfect sampler", "modes_floor")),
        unit="count",
        headline=True,
    ),
    "high_quality": Meaning(
        "High quality",
        "Share of prior samples within 3 standard deviations of a mode; more than the goal means "
        "too narrow.",
        (("goal, a perfect sampler", "high_quality_floor"),),
        headline=True,
    ),
    "reverse_kl": Meaning(
        "Reverse KL",
        "How unevenly high-quality prior samples fall on the modes, in nats; smaller is better.",
        (("floor, a perfect sampler's mean", "reverse_kl_floor"),),
        unit="number",
        headline=True,
    ),
    "reverse_kl_all": Meaning(
        "Reverse KL, all samples",
        "The same over all prior samples, each counted for its nearest mode.",
        (("floor, a perfect sampler's mean", "reverse_kl_all_floor"),),
        unit="number",
    ),
    "std_ratio": Meaning(
        "Spread of a mode",
        "Standard deviation of prior samples around their mode over that of the data, mean over "
        "modes.",
        (
            ("goal, a perfect sampler", "std_ratio_floor"),
            ("narrowest mode", "std_ratio_min"),
            ("widest mode", "std_ratio_max"),
        ),
        unit="number",
        headline=True,
    ),
    "right_mode": Meaning(
        "Right mode",
        "How often G(z', E(x)) lands in the mode of x.",
        (("goal", 1.0), ("chance", "right_mode_chance")),
        headline=True,
    ),
    "residual_std_ratio": Meaning(
        "Spread of variations",
        "Standard deviation of G(z', E(x)) - x over that of T; 1 is the optimum of D.",
        (("goal", 1.0),),
        unit="number",
    ),
    "residual_p": Meaning(
        "Fit of variations",
        "p-value of a test that G(z', E(x)) - x is distributed as T's shift; over 0.01 is a pass.",
        (("goal, at least", 0.01),),
        unit="number",
    ),
    "recon_modes": Meaning(
        "Modes of variations",
        "Modes that variations G(z', E(x)) reach within 3 standard deviations.",
        (("goal", "modes_total"),),
        unit="count",
    ),
    "recon_high_quality": Meaning(
        "High quality of variations",
        "Share of variations within 3 standard deviations of a mode; T's shift comes on top of the "
        "data's spread.",
        (("goal, the optimum of D", 0.95021),),
    ),
    "recon_std_ratio": Meaning(
        "Spread of a mode of variations",
        "Standard deviation of variations around their mode over that of the data.",
        (("goal, the optimum of D", 1.2247),),
        unit="number",
    ),
}


def shown(name: str, value: float) -> str:
    """Return a number as it is written on the page and in the terminal."""
    unit = MEANINGS[name].unit
    if unit == "percent":
        return f"{100 * value:.2f} %"
    if unit == "count":
        return f"{value:.0f}"
    if value == round(value):
        return f"{value:.0f}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def references(name: str, metrics: Mapping[str, float]) -> str:
    """Return what to compare a number with: "chance: 10.02 %; goal: 100.00 %"."""
    parts = []
    for what, value in MEANINGS[name].references:
        number = metrics.get(value) if isinstance(value, str) else value
        if number is not None:
            parts.append(f"{what}: {shown(name, number)}")
    return "; ".join(parts)


def rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Return (title, value, references, meaning) of every number, in reading order.

    Args:
        metrics: as ``evaluate`` returns them.
    """
    metrics = _short_names(metrics)
    return [
        (meaning.title, shown(name, metrics[name]), references(name, metrics), meaning.text)
        for name, meaning in MEANINGS.items()
        if name in metrics
    ]


def render(
    metrics: Mapping[str, float], metadata: Mapping[str, Any], figures: Sequence[Figure]
) -> str:
    """Return the page: numbers, figures inside it, and the metadata of the run."""
    from jinja2 import Environment

    short = _short_names(metrics)
    cards = [
        (meaning.title, shown(name, short[name]), references(name, short).partition("; ")[0])
        for name, meaning in MEANINGS.items()
        if name in short and meaning.headline
    ]
    pages = [
        (page, base64.b64encode(png(page.image)).decode(), _shown_width(page)) for page in figures
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        title=f"IVE-GAN on {metadata['dataset']}",
        metadata={k: v for k, v in metadata.items() if k != "config" and v is not None},
        settings=flatten(from_dict(metadata["config"])),
        cards=cards,
        rows=rows(metrics),
        pages=pages,
    )


def _short_names(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(PREFIX): value for name, value in metrics.items()}


def _shown_width(figure: Figure) -> int:
    """Return the width of a picture on the page: matplotlib's have twice the density."""
    width = figure.image.width
    return min(1000, width * 3 // 5 if figure.name in ("latent", "closeup") else width)
