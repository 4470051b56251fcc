"""Scatter plots, by matplotlib without its global state: arrays in, pillow images out.

Each has a title and a note above it, one line each.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ivegan.evaluation.figures import FAINT, INK, MUTED, PALETTE, PAPER
from ivegan.shapes import Float, Int


def closeup(panels: Sequence[tuple[str, Float[np.ndarray, "n 2"]]]) -> Image.Image:
    """Return all modes laid over each other: distances from the centre, in the data's stds.

    Args:
        panels: (name, offsets from the mode's centre or from x, in stds); at most 6 stds are shown.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    figure = Figure(figsize=(3.2 * len(panels) + 0.4, 4.2), dpi=150)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for i, (axis, (name, offsets)) in enumerate(zip(axes, panels, strict=True)):
        axis.scatter(*offsets.T, s=3, color=PALETTE[0], alpha=0.25, linewidths=0, rasterized=True)
        for radius in (1, 2, 3):
            axis.add_patch(Circle((0, 0), radius, fill=False, color="#CC6677", linewidth=0.9))
        axis.set(xlim=(-6, 6), ylim=(-6, 6), aspect="equal", xticks=(-6, -3, 0, 3, 6))
        axis.set_title(name, fontsize=10, color=INK)
        plain_axis(axis)
        shown = np.mean(np.abs(offsets).max(axis=1) <= 6)
        axis.set_xlabel(f"standard deviations; {shown:.0%} shown", fontsize=8, color=MUTED)
        axis.tick_params(labelleft=i == 0)
    note = "Circles at 1, 2 and 3 standard deviations of the data"
    return finished(figure, "All modes laid over each other", note)


def scatter(
    codes: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, " n"],
    names: Sequence[str],
    title: str,
    *,
    note: str = "",
    axes: bool = True,
) -> Image.Image:
    """Return codes in two or three dimensions, coloured by label (Fig. 5 of the paper).

    Args:
        codes: d is 2 or 3.
        labels: indices into ``names``; -1 is drawn in pale grey, below the rest.
        names: of the classes, for the legend.
        axes: whether the axes are entries of z; they mean nothing otherwise and are left out.
    """
    from matplotlib.figure import Figure

    solid = codes.shape[1] == 3
    figure = Figure(figsize=(7.8, 6.9), dpi=150)
    axis: Any = figure.add_subplot(projection="3d" if solid else None)
    _points(axis, codes, labels, names, PALETTE)
    if solid:
        axis.view_init(elev=22, azim=-60)
        axis.set_box_aspect((1, 1, 1), zoom=0.97)
        for pane in (axis.xaxis, axis.yaxis, axis.zaxis):
            pane.set_pane_color((1, 1, 1, 1))
            pane.line.set_color(MUTED)
            pane._axinfo["grid"].update(color=FAINT, linewidth=0.6)
    else:
        plain_axis(axis)
        axis.set_aspect("equal")
        if labels.min() >= 0:
            _name_groups(axis, codes, labels, names)
    if axes:
        axis.locator_params(nbins=4)
        for letter, name in zip("xyz"[: codes.shape[1]], ("z₁", "z₂", "z₃"), strict=False):
            getattr(axis, f"set_{letter}label")(name, fontsize=10, color=MUTED)
    else:
        axis.set_axis_off()
    axis.tick_params(labelsize=8, colors=MUTED)
    _legend(figure, axis)
    return finished(figure, title, note, right=0.86)


def maps(
    panels: Sequence[tuple[str, Float[np.ndarray, "n 2"], Int[np.ndarray, " n"]]],
    names: Sequence[str],
) -> Image.Image:
    """Return t-SNE maps (name, positions, labels) side by side, coloured by label (Fig. 8)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(panels) + 2.0, 6.0), dpi=150)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, positions, labels) in zip(axes, panels, strict=True):
        _points(axis, positions, labels, names, PALETTE[::2])
        axis.set_title(name, fontsize=11, color=INK)
        axis.set_axis_off()
    _legend(figure, axes[0])
    title = "Held-out images by t-SNE, coloured by attribute"
    note = (
        "Each in the colour of the first of its attributes; neighbourhoods count, distances do not"
    )
    return finished(figure, title, note, right=0.85)


def _points(
    axis: Any, positions: np.ndarray, labels: np.ndarray, names: Sequence[str], colours: Any
) -> None:
    """Draw points in the colours of their labels, those without a label below the rest."""
    size = float(np.clip(14000 / len(positions), 4, 24))
    for label in range(-1 if labels.min() < 0 else 0, len(names)):
        colour = FAINT if label < 0 else colours[label % len(colours)]
        text = "other" if label < 0 else names[label].replace("_", " ")
        own = positions[labels == label]
        axis.scatter(*own.T, s=size, color=colour, label=text, alpha=0.75, linewidths=0)


def _legend(figure: Any, axis: Any) -> None:
    handles, names = axis.get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 10, "labelcolor": INK, "markerscale": 2}
    legend = figure.legend(handles, names, loc="center right", bbox_to_anchor=(0.99, 0.46), **style)
    for handle in legend.legend_handles:
        handle.set_alpha(1)


def _name_groups(axis: Any, codes: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
    """Write each class's name into its middle, so that nobody needs to tell ten colours apart."""
    from matplotlib.patheffects import withStroke

    for label in np.unique(labels[labels >= 0]):
        x, y = np.median(codes[labels == label], axis=0)
        halo = [withStroke(linewidth=3, foreground=PAPER)]
        axis.text(
            x, y, names[label], color=INK, fontsize=12, ha="center", va="center", path_effects=halo
        )


def plain_axis(axis: Any) -> None:
    """Leave two pale axes, at the left and below."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(labelsize=8, colors=MUTED, color=FAINT)


def finished(figure: Any, title: str, note: str, right: float = 0.98) -> Image.Image:
    """Return a matplotlib figure as an image, under a title set like those of the grids."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    width, height = figure.get_size_inches()
    left = 0.16 / width
    figure.text(left, 1 - 0.16 / height, title, va="top", fontsize=13, color=INK)
    figure.text(left, 1 - 0.42 / height, note, va="top", fontsize=9.5, color=MUTED)
    figure.tight_layout(rect=(0.01, 0.01, right, 1 - 0.66 / height))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
