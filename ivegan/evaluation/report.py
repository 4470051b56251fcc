"""The numbers and pictures of an evaluation as one HTML file that needs nothing else.

What each number means, and what to hold it against, stands here once, for the page and for the
table that the command prints.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from PIL import Image

from ivegan.config import flatten, from_dict
from ivegan.evaluation.figures import png


class Figure(NamedTuple):
    """One picture of an evaluation."""

    name: str
    """Of the file, without ``.png``."""
    image: Image.Image
    caption: str
    """What to look for, in a sentence or two."""


@dataclass(frozen=True)
class Meaning:
    """How a number is shown, and what to hold it against."""

    title: str
    tells: str
    """What the number says, in one sentence."""
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
    "kmeans_accuracy": Meaning(
        "k-means accuracy",
        "Accuracy of clusters of test codes, found without labels, matched to classes one to one.",
        (("raw pixels", "kmeans_accuracy_pixels"), ("chance", "majority")),
    ),
    "kmeans_nmi": Meaning(
        "k-means NMI",
        "What those clusters and the classes know of each other: 0 nothing, 1 everything.",
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
    "retrieval": Meaning(
        "Invariance",
        "How often E(T(x)) is nearest to E(x) among all test codes: whether E ignores T.",
        (("chance", "retrieval_chance"), ("goal", 1.0)),
        headline=True,
    ),
    "variation_ratio": Meaning(
        "Variation by z'",
        "How much z' changes an image against how much T does: 0 is a dead z', 1 as much as T.",
        (("goal", 1.0),),
        unit="number",
    ),
    "modes": Meaning(
        "Modes found",
        "Modes that prior samples reach within 3 standard deviations.",
        (("goal", "modes_total"),),
        unit="count",
        headline=True,
    ),
    "high_quality": Meaning(
        "High quality",
        "Share of prior samples within 3 standard deviations of a mode; more than the goal means "
        "too narrow.",
        (("goal, a perfect sampler", 0.98889),),
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
        (("floor, a perfect sampler's mean", "reverse_kl_floor"),),
        unit="number",
    ),
    "std_ratio": Meaning(
        "Spread of a mode",
        "Standard deviation of prior samples around their mode over that of the data, mean over "
        "modes.",
        (("goal", 1.0), ("narrowest mode", "std_ratio_min"), ("widest mode", "std_ratio_max")),
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
        "p-value of a test that G(z', E(x)) - x is distributed as T's shift; over .01 is a pass.",
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
}  # fmt: skip


PREFIX = "eval/"
"""Of every number's name outside this module, as it stands in ``metrics.json`` and in MLflow."""


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
    """Return what to hold a number against: "chance 10.02 %, goal 100.00 %"."""
    parts = []
    for what, value in MEANINGS[name].references:
        number = metrics.get(value) if isinstance(value, str) else value
        if number is not None:
            parts.append(f"{what}: {shown(name, number)}")
    return "; ".join(parts)


def rows(metrics: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Return (title, value, references, meaning) of every number there is, in reading order.

    Args:
        metrics: as ``evaluate`` returns them.
    """
    metrics = _short_names(metrics)
    return [
        (about.title, shown(name, metrics[name]), references(name, metrics), about.tells)
        for name, about in MEANINGS.items()
        if name in metrics
    ]


def render(
    metrics: Mapping[str, float], facts: Mapping[str, Any], figures: Sequence[Figure]
) -> str:
    """Return the page: numbers, pictures inside it, and the facts of the run."""
    table = "".join(
        f'<tr><td><b>{text(title)}</b><p>{text(tells)}</p></td><td class="value">{value}</td>'
        f"<td>{'<br>'.join(text(part) for part in against.split('; '))}</td></tr>"
        for title, value, against, tells in rows(metrics)
    )
    metrics = _short_names(metrics)
    cards = "".join(
        f'<div class="card"><div class="name">{text(about.title)}</div>'
        f'<div class="value">{shown(name, metrics[name])}</div>'
        f'<div class="against">{text(_first_reference(name, metrics))}</div></div>'
        for name, about in MEANINGS.items()
        if name in metrics and about.headline
    )
    pictures = "".join(picture(figure) for figure in figures)
    about = {k: v for k, v in facts.items() if k != "config" and v is not None}
    settings = flatten(from_dict(facts["config"]))
    body = _BODY.format(
        cards=cards,
        table=table,
        pictures=pictures,
        facts=_pairs(about),
        settings=_pairs(settings),
    )
    lead = (
        f"{facts['images_seen']:,} samples seen in training · {facts['evaluated']:,} held-out "
        f"samples evaluated · run {facts.get('run_id') or 'without a name'}"
    )
    return page(f"IVE-GAN on {facts['dataset']}", lead, body)


def page(title: str, lead: str, body: str) -> str:
    """Return a whole HTML page around a body, which is HTML already; title and lead are text."""
    return _PAGE.format(style=_STYLE, title=text(title), lead=text(lead), body=body)


def _short_names(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name.removeprefix(PREFIX): value for name, value in metrics.items()}


def _first_reference(name: str, metrics: Mapping[str, float]) -> str:
    return references(name, metrics).partition("; ")[0]


def picture(figure: Figure) -> str:
    """Return a figure as HTML, with its image inside."""
    source = base64.b64encode(png(figure.image)).decode()
    caption = text(figure.caption)
    return (
        f'<figure id="{figure.name}"><img alt="{caption}" width="{_shown_width(figure)}" '
        f'src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'
    )


def _shown_width(figure: Figure) -> int:
    """Return the width a picture has on the page: matplotlib's are drawn at twice the density."""
    width = figure.image.width
    return min(1000, width * 3 // 5 if figure.name in ("latent", "closeup", "sweep") else width)


def _pairs(values: Mapping[str, Any]) -> str:
    return "".join(
        f"<tr><td>{text(name)}</td><td><code>{text(value)}</code></td></tr>"
        for name, value in values.items()
    )


def text(value: object) -> str:
    """Return a value as text for an HTML page."""
    return html.escape(str(value))


_STYLE = """
:root { --ink: #1d2530; --muted: #5d6774; --line: #e3e7ec; --soft: #f6f8fa; --accent: #332288; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 32px 80px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -.01em; }
h2 { font-size: 21px; margin: 56px 0 16px; }
.lead { color: var(--muted); margin: 0 0 32px; }
.cards { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); }
.card { background: var(--soft); border-radius: 10px; padding: 16px 18px; }
.card .name { color: var(--muted); font-size: 14px; }
.card .value { font-size: 27px; font-weight: 650; margin: 2px 0; }
.card .against { color: var(--muted); font-size: 13px; line-height: 1.35; }
.value { font-variant-numeric: tabular-nums; white-space: nowrap; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; color: var(--muted); font-weight: 500; font-size: 14px; }
th, td { padding: 12px 20px 12px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td p { margin: 2px 0 0; color: var(--muted); font-size: 14px; max-width: 56ch; }
td.value { font-weight: 650; }
td:nth-child(3) { color: var(--muted); font-size: 14px; }
figure { margin: 0 0 40px; padding: 20px 20px 16px; border: 1px solid var(--line);
  border-radius: 10px; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--muted); font-size: 14px; margin-top: 12px; padding-top: 12px;
  border-top: 1px solid var(--line); }
details { border-bottom: 1px solid var(--line); padding: 12px 0; }
summary { cursor: pointer; font-weight: 550; }
details table { margin: 12px 0 4px; font-size: 14px; }
details td { padding: 5px 20px 5px 0; border: 0; }
details td:first-child { color: var(--muted); white-space: nowrap; width: 1%; }
code { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  overflow-wrap: anywhere; }
@media print { main { padding: 0; } figure { break-inside: avoid; } }
"""

_BODY = """<div class="cards">{cards}</div>
<h2>Every number, and what to hold it against</h2>
<table>
<thead><tr><th>What</th><th>Here</th><th>For comparison</th></tr></thead>
<tbody>{table}</tbody>
</table>
<h2>Pictures</h2>
{pictures}
<h2>Where this comes from</h2>
<details open><summary>Run</summary><table>{facts}</table></details>
<details><summary>Settings</summary><table>{settings}</table></details>
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="lead">{lead}</p>
{body}
</main>
</body>
</html>
"""
