"""Tables of cells, in Markdown: the floor, raw pixels, each row's mean ± std, published numbers."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ivegan.evaluation.report import MEANINGS
from pipelines.reproduction.cells import Result
from pipelines.reproduction.tasks import Table

PUBLISHED = tomllib.loads(Path(__file__).with_name("published.toml").read_text("utf-8"))["rows"]
"""Numbers of other work: tasks, method, source, and metrics as text."""
# Of columns whose floor has no name of its own.
_FLOORS = {
    "same_class": "classifier_accuracy",
    "same_attributes": "classifier_accuracy",
    "frechet_fitted": "frechet_recon_floor",
}
_IDEAL = {"variation_ratio": 1.0, "right_mode": 1.0, "residual_std_ratio": 1.0}


def render(task: Table, results: Mapping[str, Sequence[Result]]) -> str:
    """Return a task's table, of the results of each row that has any, by its name."""
    lines = [["", "seeds", *(MEANINGS[name].title for name in task.metrics), "training, s"]]
    lines.append(["---"] * len(lines[0]))
    done = [r for row in results.values() for r in row if r.metrics]
    known = {name: value for r in done for name, value in r.metrics.items()}
    floor = {name: known.get(_FLOORS.get(name, f"{name}_floor")) for name in task.metrics}
    floor |= {name: _IDEAL.get(name) for name in task.metrics if floor[name] is None}
    pixels = {name: known.get(f"{name}_pixels") for name in task.metrics}
    for title, numbers in (("floor, real data", floor), ("raw pixels", pixels)):
        texts = [
            "" if numbers[name] is None else _numbers(name, [numbers[name]])
            for name in task.metrics
        ]
        if any(texts):
            lines.append([title, "", *texts, ""])
    for name, row in task.rows.items():
        if results.get(name):
            lines.append(_row(task, row.title, results[name]))
    for row in (row for row in PUBLISHED if task.name in row["tasks"]):
        title = f"*published: {row['method']} ({row['source']})*"
        lines.append([title, "", *(row["metrics"].get(n, "") for n in task.metrics), ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(task: Table, title: str, results: Sequence[Result]) -> list[str]:
    good = [r for r in results if r.metrics]
    count = str(len(results))
    if len(good) < len(results):
        count += f", {len(results) - len(good)} diverged"
    texts = [
        _numbers(name, [r.metrics[name] for r in good if name in r.metrics])
        for name in task.metrics
    ]
    seconds = np.mean([r.train_seconds for r in good]) if good else 0.0
    return [title, count, *texts, f"{seconds:,.0f}"]


def _numbers(name: str, values: Sequence[float | None]) -> str:
    """Return mean ± standard deviation, in the unit of the metric; nothing of no values."""
    if not values:
        return ""
    numbers = np.array(values, dtype=np.float64)
    unit = MEANINGS[name].unit
    scale, end = (100, " %") if unit == "percent" else (1, "")
    mean = scale * numbers.mean()
    digits = 1 if unit in ("percent", "count") or mean >= 10 else 2 if mean >= 0.1 else 4
    if len(numbers) == 1:
        return f"{mean:.{digits}f}{end}"
    return f"{mean:.{digits}f} ± {scale * numbers.std(ddof=1):.{digits}f}{end}"
