"""The figure of a sweep: the course of every trial, and scores against settings."""

from collections.abc import Mapping
from typing import Any

from ivegan.evaluation.figures import INK, MUTED, PALETTE, png
from ivegan.evaluation.plots import finished, plain_axis
from pipelines.sweeps.space import SearchObjective


def picture(result: Mapping[str, Any]) -> bytes:
    """Return the PNG of a finished sweep: the course of each trial, and last scores by setting."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    objective, length = SearchObjective(**result["objective"]), result["length"]
    trials = [t for t in result["trials"] if t[objective.metric] is not None]
    curves = [(t["curve"]["images_seen"], t["curve"][objective.metric]) for t in trials]
    names = [k for k, v in trials[0]["config"].items() if isinstance(v, (int, float))]
    columns = 2 + -(-len(names) // 2)
    figure = Figure(figsize=(3.1 * columns, 5.6), dpi=150)
    grid = figure.add_gridspec(2, columns)
    axis: Any = figure.add_subplot(grid[:, :2])
    plain_axis(axis)
    whole = [len(seen) > 0 and seen[-1] >= length for seen, _ in curves]
    for place in reversed(range(len(curves))):
        seen, scores = curves[place]
        colour = PALETTE[0] if place == 0 else PALETTE[1] if whole[place] else "#b9c1cb"
        axis.plot(seen, scores, color=colour, linewidth=2.4 if place == 0 else 1.3, marker="o",
                  markersize=4 if place == 0 else 2.5, zorder=3 if place == 0 else 2)  # fmt: skip
        if not whole[place]:
            axis.plot(seen[-1:], scores[-1:], marker="x", markersize=6, color=MUTED, zorder=2)
    axis.set_xlim(0, length * 1.02)
    axis.set_xlabel("images seen  (x: stopped early)", fontsize=9, color=MUTED)
    axis.set_ylabel(f"{objective.name}, on held-out samples", fontsize=9, color=MUTED)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 1.5M
    last = [scores[-1] for _, scores in curves]
    low, high = min(last), max(last)
    room = max(0.02, 0.08 * (high - low))
    for place, name in enumerate(names):
        axis = figure.add_subplot(grid[place % 2, 2 + place // 2])
        plain_axis(axis)
        values = [t["config"][name] for t in trials]
        sizes = sorted(set(values))
        if all(isinstance(v, int) for v in values) and len(sizes) <= 6:  # however far apart
            axis.set_xticks(range(len(sizes)), [f"{v:g}" for v in sizes])
            axis.set_xlim(-0.5, len(sizes) - 0.5)
            values = [sizes.index(v) for v in values]
        elif min(values) > 0 and max(values) / min(values) > 5:
            axis.set_xscale("log")
        for kept, colour in ((False, "#b9c1cb"), (True, PALETTE[1])):
            own = [i for i in range(1, len(last)) if whole[i] is kept]
            axis.scatter([values[i] for i in own], [last[i] for i in own], s=26, color=colour,
                         linewidths=0, zorder=2)  # fmt: skip
        axis.scatter(values[:1], last[:1], s=70, color=PALETTE[0], linewidths=0, zorder=3)
        axis.set_ylim(low - room, high + room)
        axis.set_xlabel(name, fontsize=9, color=INK)
    states = sorted(t["state"] for t in result["trials"])
    counts = ", ".join(f"{states.count(one)} {one}" for one in dict.fromkeys(states))
    note = f"{len(result['trials'])} trials of {length:,} images: {counts}"
    return png(finished(figure, f"{result['preset']}: sweep {result['sweep_id']}", note))
