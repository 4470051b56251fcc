"""The numbers and figures of an evaluation as one HTML file that needs nothing else.

What each number means, and what to compare it with, is defined once, for the page, for the table
that the command prints and for the model card.
"""

import base64
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from ivegan.config import flatten, from_dict

PREFIX = "eval/"
"""Of every number's name in ``metrics.json`` and in MLflow."""
_FOLDER = Path(__file__).parent


class Figure(NamedTuple):
    """One picture of an evaluation."""

    name: str
    """Of the file, without ``.png``."""
    image: Image.Image
    caption: str
    """What to look for, in a sentence or two."""


@dataclass(frozen=True)
class Meaning:
    """How a number is written, and what to compare it with: a table of ``meanings.toml``."""

    title: str
    text: str
    """What the number measures, in one sentence."""
    compare: Sequence[Sequence[str | float]] = ()
    """(what it is, a constant or the name of another number of the same evaluation)."""
    unit: Literal["percent", "number", "count"] = "percent"
    headline: bool = False
    """Whether it is one of the few at the top of the page."""


MEANINGS = {
    name: Meaning(**table)
    for name, table in tomllib.loads((_FOLDER / "meanings.toml").read_text("utf-8")).items()
}


class Entry(NamedTuple):
    """One number of an evaluation, as it is written."""

    name: str
    """With the prefix."""
    meaning: Meaning
    value: str
    compare: str
    """What to compare it with: "chance: 10.02 %; goal: 100.00 %"."""


def shown(meaning: Meaning, value: float) -> str:
    """Return a number as it is written on the page and in the terminal."""
    if meaning.unit == "percent":
        return f"{100 * value:.2f} %"
    if meaning.unit == "count" or value == round(value):
        return f"{value:.0f}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.2f}"


def rows(metrics: Mapping[str, float]) -> list[Entry]:
    """Return every number of an evaluation, in reading order."""
    found = []
    for short, meaning in MEANINGS.items():
        if (name := PREFIX + short) in metrics:
            pairs = [
                (what, metrics.get(PREFIX + value) if isinstance(value, str) else value)
                for what, value in meaning.compare
            ]
            compare = (f"{what}: {shown(meaning, v)}" for what, v in pairs if v is not None)
            found.append(Entry(name, meaning, shown(meaning, metrics[name]), "; ".join(compare)))
    return found


def headline(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Return title, value and first comparison of the most important numbers."""
    important = (row for row in rows(metrics) if row.meaning.headline)
    return [(row.meaning.title, row.value, row.compare.partition("; ")[0]) for row in important]


def render(
    metrics: Mapping[str, float],
    metadata: Mapping[str, Any],
    figures: Sequence[Figure],
    files: Mapping[str, bytes],
) -> str:
    """Return the page: numbers, the PNG files of the figures, and the metadata of the run."""
    from jinja2 import Environment

    pngs = [base64.b64encode(files[f"{figure.name}.png"]).decode() for figure in figures]
    pages = list(zip(figures, pngs, map(_shown_width, figures), strict=True))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((_FOLDER / "report.html.j2").read_text("utf-8")).render(
        title=f"IVE-GAN on {metadata['dataset']}",
        metadata={k: v for k, v in metadata.items() if k != "config" and v is not None},
        settings=flatten(from_dict(metadata["config"])),
        cards=headline(metrics),
        rows=rows(metrics),
        pages=pages,
    )


def _shown_width(figure: Figure) -> int:
    """Return the width of a picture on the page: matplotlib's have twice the density."""
    width = figure.image.width
    return min(1000, width * 3 // 5 if figure.name in ("latent", "closeup") else width)
