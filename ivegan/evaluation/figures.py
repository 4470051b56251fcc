"""The pictures: arrays in, pillow images out; nothing here opens a checkpoint or a file.

Grids of images and densities are drawn with pillow alone, because training draws them too and must
run where there is no matplotlib. Scatter plots use matplotlib, without its global state.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ivegan.config import Config
from ivegan.order import modes
from ivegan.shapes import Float, Int, UInt8
from ivegan.transforms import to_float, to_uint8

if TYPE_CHECKING:
    from ivegan.networks import EncoderGenerator

INK, MUTED, FAINT, PAPER = "#1d2530", "#667080", "#e3e7ec", "#ffffff"
# Paul Tol's "muted" palette, which stays apart under colour blindness, and a dark grey.
PALETTE = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933",
    "#DDCC77", "#CC6677", "#882255", "#AA4499", "#5B6470",
)  # fmt: skip
_PROGRESS_SEED = 2018  # of z and z' in the pictures of training: the same all through a run

# White to dark blue through even steps of lightness.
_DENSITY = ("#ffffff", "#dbe9f6", "#a8cee4", "#62a8d2", "#2d7dbb", "#0f4f94", "#08264f")

_TITLE, _TEXT = 22, 16  # font sizes in pixels
_MARGIN = 24


# --- Grids of images ----------------------------------------------------------------------------


def sample_grid(
    images: UInt8[np.ndarray, "n c h w"], title: str, *, note: str = "", columns: int = 10
) -> Image.Image:
    """Return images side by side, row by row (Fig. 3 of the paper).

    Args:
        images: as many whole rows as there are; a rest is left out.
        title, note: one line each, above the grid.
        columns: images in a row.
    """
    rows = max(1, len(images) // columns)
    shown = images[: rows * columns]
    return image_rows(shown.reshape(rows, -1, *images.shape[1:]), title, note=note)


def reconstruction_rows(
    x: UInt8[np.ndarray, "n c h w"],
    transformed: UInt8[np.ndarray, "t n c h w"],
    x_hat: UInt8[np.ndarray, "k n c h w"],
    title: str,
    *,
    note: str = "",
) -> Image.Image:
    """Return originals above their transformations and their variations (Figs. 4 and 6).

    Args:
        x: originals.
        transformed: T(x), one row per draw of T; may have no rows.
        x_hat: G(z', E(x)), one row per draw of z'.
        title, note: one line each, above the rows.
    """
    labels = ["x", *["T(x)"] * len(transformed), *["G(z', E(x))"] * len(x_hat)]
    starts = {1, 1 + len(transformed)}
    return image_rows(
        np.concatenate((x[None], transformed, x_hat)),
        title,
        note=note,
        row_labels=labels,
        breaks=tuple(starts),
    )


def image_rows(
    images: UInt8[np.ndarray, "r n c h w"],
    title: str,
    *,
    note: str = "",
    row_labels: Sequence[str] = (),
    breaks: Sequence[int] = (),
    column_breaks: Sequence[int] = (),
) -> Image.Image:
    """Return rows of images under a title, enlarged by a whole factor so that pixels stay crisp.

    Args:
        images: one or three channels.
        title, note: one line each, above the grid.
        row_labels: one per row, at its left; a label like the one above it is not repeated.
        breaks: rows that are set off by a wider gap above them.
        column_breaks: columns that are set off by a wider gap at their left.
    """
    num_rows, num_columns, channels, height, width = images.shape
    scale = max(1, round(64 / height))
    tile_h, tile_w, gap, wide = height * scale, width * scale, 6, 18
    titles, text = _font(_TITLE), _font(_TEXT)
    label_w = max((_width(text, label) for label in row_labels), default=0)
    left = _MARGIN + (label_w + 16 if label_w else 0)
    top = _MARGIN + 36 + (28 if note else 4)
    xs = [left + i * (tile_w + gap) + wide * sum(b <= i for b in column_breaks if b)
          for i in range(num_columns)]  # fmt: skip
    ys = [top + i * (tile_h + gap) + wide * sum(b <= i for b in breaks if b)
          for i in range(num_rows)]  # fmt: skip
    right = max(xs[-1] + tile_w, _MARGIN + _width(titles, title), _MARGIN + _width(text, note))
    page = Image.new("RGB", (right + _MARGIN, ys[-1] + tile_h + _MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, INK, titles)
    draw.text((_MARGIN, _MARGIN + 30), note, MUTED, text)
    for row, y in enumerate(ys):
        if label_w and (row == 0 or row_labels[row] != row_labels[row - 1]):
            draw.text((_MARGIN, y + tile_h / 2), row_labels[row], INK, text, anchor="lm")
        for column, x in enumerate(xs):
            pixels = images[row, column].transpose(1, 2, 0)
            tile = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            page.paste(tile.resize((tile_w, tile_h), Image.Resampling.NEAREST), (x, y))
    return page


# --- Points -------------------------------------------------------------------------------------


def density(
    panels: Sequence[tuple[str, Float[np.ndarray, "n 2"]]],
    dataset: str,
    title: str,
    *,
    note: str = "",
    side: int = 260,
) -> Image.Image:
    """Return density plots of sets of points, each under its name (Fig. 2 of the paper).

    A plot's darkness is the square root of its smoothed density, over the densest spot of the
    first panel: thin bridges between modes stay visible, and panels can be compared.

    Args:
        panels: (name, points), the true data first.
        dataset: ring or grid, which sets the scale: radius 1, or spacing 2.
        title, note: one line each, above the panels.
        side: pixels of one panel.
    """
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    titles, text = _font(_TITLE), _font(_TEXT)
    gap, top, name_h = 20, _MARGIN + 32 + (32 if note else 8), 28
    width = columns * (side + gap) - gap + 2 * _MARGIN
    width = max(width, 2 * _MARGIN + max(_width(titles, title), _width(text, note)))
    page = Image.new("RGB", (width, top + rows * (side + name_h + gap) - gap + _MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, INK, titles)
    draw.text((_MARGIN, _MARGIN + 30), note, MUTED, text)
    maps = [_smoothed(points, dataset, side) for _, points in panels]
    peak = maps[0].max()
    for i, ((name, _), values) in enumerate(zip(panels, maps, strict=True)):
        x = _MARGIN + (i % columns) * (side + gap)
        y = top + i // columns * (side + name_h + gap)
        draw.text((x + side / 2, y + name_h - 8), name, INK, text, anchor="ms")
        page.paste(_coloured(values / peak), (x, y + name_h))
        draw.rectangle((x, y + name_h, x + side - 1, y + name_h + side - 1), outline=FAINT)
    return page


def _smoothed(points: np.ndarray, dataset: str, side: int) -> np.ndarray:
    """Return the density of points over the data's square, (side, side), y upwards."""
    means, _ = modes(dataset)
    extent = 1.3 * np.abs(means).max()
    edges = np.linspace(-extent, extent, side + 1)
    counts = np.histogram2d(points[:, 1], points[:, 0], bins=(edges, edges))[0][::-1]
    # A mode is about as wide as a pixel: smoothing makes it a visible dot.
    pixels = np.arange(side)
    blur = np.exp(-0.5 * ((pixels[:, None] - pixels) / 2.5) ** 2)
    counts = blur @ counts @ blur
    return counts / max(1, len(points))


def _coloured(values: np.ndarray) -> Image.Image:
    """Return values in [0, 1] as colours, the root taken to lift the faint ones."""
    stops = np.array([_rgb(c) for c in _DENSITY], dtype=np.float64)
    place = np.sqrt(values.clip(0, 1)) * (len(stops) - 1)
    low = place.astype(int).clip(0, len(stops) - 2)
    share = (place - low)[..., None]
    return Image.fromarray((stops[low] * (1 - share) + stops[low + 1] * share).astype(np.uint8))


def closeup(
    panels: Sequence[tuple[str, Float[np.ndarray, "n 2"]]], title: str, *, note: str = ""
) -> Image.Image:
    """Return all modes laid over each other: distances from the centre, in the data's stds.

    Args:
        panels: (name, offsets from the mode's centre or from x, in stds); at most 6 stds are shown.
        title, note: one line each, above the panels.
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
        _plain_axis(axis)
        shown = np.mean(np.abs(offsets).max(axis=1) <= 6)
        axis.set_xlabel(f"standard deviations; {shown:.0%} shown", fontsize=8, color=MUTED)
        axis.tick_params(labelleft=i == 0)
    return _finished(figure, title, note)


# --- Codes --------------------------------------------------------------------------------------


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
        title, note: one line each, above the plot.
        axes: whether the axes are entries of z; they mean nothing otherwise and are left out.
    """
    from matplotlib.figure import Figure

    solid = codes.shape[1] == 3
    figure = Figure(figsize=(7.8, 6.9), dpi=150)
    axis: Any = figure.add_subplot(projection="3d" if solid else None)
    size = float(np.clip(14000 / len(codes), 4, 24))
    for label in range(-1, len(names)):
        own = codes[labels == label]
        if len(own):
            axis.scatter(
                *own.T,
                s=size,
                color=FAINT if label < 0 else PALETTE[label % len(PALETTE)],
                label="other" if label < 0 else names[label],
                alpha=0.75,
                linewidths=0,
            )
    if solid:
        axis.view_init(elev=22, azim=-60)
        axis.set_box_aspect((1, 1, 1), zoom=0.97)
        for pane in (axis.xaxis, axis.yaxis, axis.zaxis):
            pane.set_pane_color((1, 1, 1, 1))
            pane.line.set_color(MUTED)
            pane._axinfo["grid"].update(color=FAINT, linewidth=0.6)
    else:
        _plain_axis(axis)
        axis.set_aspect("equal")
        if labels.min() >= 0:
            _name_groups(axis, codes, labels, names)
    if axes:
        axis.locator_params(nbins=4)
        setters = (axis.set_xlabel, axis.set_ylabel) + ((axis.set_zlabel,) if solid else ())
        for setter, name in zip(setters, ("z₁", "z₂", "z₃"), strict=False):
            setter(name, fontsize=10, color=MUTED)
    else:
        axis.set_axis_off()
    axis.tick_params(labelsize=8, colors=MUTED)
    handles, legend_names = axis.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        legend_names,
        loc="center right",
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        markerscale=max(1.0, (40 / size) ** 0.5),
        bbox_to_anchor=(0.99, 0.46),
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return _finished(figure, title, note, right=0.86)


def _name_groups(axis: Any, codes: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> None:
    """Write each class's name into its middle, so that nobody needs to tell ten colours apart."""
    from matplotlib.patheffects import withStroke

    for label in np.unique(labels[labels >= 0]):
        x, y = np.median(codes[labels == label], axis=0)
        halo = [withStroke(linewidth=3, foreground=PAPER)]
        axis.text(
            x, y, names[label], color=INK, fontsize=12, ha="center", va="center", path_effects=halo
        )


def _plain_axis(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(FAINT)
    axis.tick_params(labelsize=8, colors=MUTED, color=FAINT)


def _finished(figure: Any, title: str, note: str, right: float = 0.98) -> Image.Image:
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


# --- Sweeps -------------------------------------------------------------------------------------


def search(
    curves: Sequence[tuple[Sequence[int], Sequence[float]]],
    settings: Mapping[str, Sequence[float]],
    length: int,
    title: str,
    *,
    score: str = "quality",
    note: str = "",
) -> Image.Image:
    """Return the trials of a sweep: the course of each, and its last score against each setting.

    Args:
        curves: for each trial, images seen and scores; the first trial is the best.
        settings: values by dotted name, one per trial.
        length: images of a trial that is not stopped.
        title, note: one line each, above the plots.
        score: what the scores are called.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    names = list(settings)
    columns = 2 + -(-len(names) // 2)
    figure = Figure(figsize=(3.1 * columns, 5.6), dpi=150)
    grid = figure.add_gridspec(2, columns)
    axis: Any = figure.add_subplot(grid[:, :2])
    _plain_axis(axis)
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
    axis.set_ylabel(f"{score}, on held-out samples", fontsize=9, color=MUTED)
    axis.xaxis.set_major_formatter(lambda value, _: _thousands(value))
    last = [scores[-1] for _, scores in curves]
    low, high = min(last), max(last)
    room = max(0.02, 0.08 * (high - low))
    for place, name in enumerate(names):
        axis = figure.add_subplot(grid[place % 2, 2 + place // 2])
        _plain_axis(axis)
        values = settings[name]
        sizes = sorted(set(values))
        if all(isinstance(v, int) for v in values) and len(sizes) <= 6:  # however far apart
            axis.set_xticks(range(len(sizes)), [f"{v:g}" for v in sizes])
            axis.set_xlim(-0.5, len(sizes) - 0.5)
            values = [sizes.index(v) for v in values]
        elif min(values) > 0 and max(values) / min(values) > 5:
            axis.set_xscale("log")
            # One power of ten or two are too few to read a value by; more labels would overlap.
            few = max(values) / min(values) < 50
            axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axis.xaxis.set_minor_formatter("{x:g}" if few else "")
            if few:
                axis.xaxis.set_major_formatter("{x:g}")
            axis.tick_params(which="minor", labelsize=8, colors=MUTED, color=FAINT, length=3.5,
                             pad=3.5)  # fmt: skip
        for kept, colour in ((False, "#b9c1cb"), (True, PALETTE[1])):
            own = [i for i in range(1, len(last)) if whole[i] is kept]
            axis.scatter([values[i] for i in own], [last[i] for i in own], s=26, color=colour,
                         linewidths=0, zorder=2)  # fmt: skip
        axis.scatter(values[:1], last[:1], s=70, color=PALETTE[0], linewidths=0, zorder=3)
        axis.set_ylim(low - room, high + room)
        axis.set_xlabel(name, fontsize=9, color=INK)
    return _finished(figure, title, note)


def _thousands(value: float) -> str:
    """Return a count as it is written on an axis: 200k, 1.5M."""
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


# --- Training -----------------------------------------------------------------------------------


@torch.no_grad()
def progress_figures(
    players: "EncoderGenerator", config: Config, originals: np.ndarray | None
) -> dict[str, bytes]:
    """Return PNGs of how far training is, at the same z, z' and originals all through a run.

    Args:
        players: E and G; left as they are, in the mode they are in.
        config: of the run.
        originals: images to make variations of, (n, c, h, w) uint8; None for points.
    """
    generator = torch.Generator().manual_seed(_PROGRESS_SEED)
    device = next(players.parameters()).device
    model = config.model
    count = 10_000 if config.is_points else 60
    z = (2 * torch.rand(count, model.z_dim, generator=generator) - 1).to(device)
    noise = torch.randn(count, model.noise_dim, generator=generator).to(device)
    modes_before = [(part, part.training) for part in players.modules()]
    players.eval()  # batch norm must neither use nor learn the statistics of these
    try:
        samples = players.generator(noise, z).cpu()
        if originals is None:
            pages = {"samples": _progress_points(samples.numpy(), config.dataset)}
        else:
            x = np.array(originals)
            codes = players.encoder(to_float(torch.from_numpy(x)).to(device))
            made = [players.generator(part, codes) for part in noise[: 4 * len(x)].split(len(x))]
            x_hat = np.stack([to_uint8(variation.cpu()).numpy() for variation in made])
            pages = {
                "samples": sample_grid(to_uint8(samples).numpy(), "Samples from the prior"),
                "reconstructions": reconstruction_rows(
                    x, x_hat[:0], x_hat, "Originals and their variations"
                ),
            }
    finally:
        for part, was_training in modes_before:
            part.training = was_training
    return {name: png(page) for name, page in pages.items()}


def _progress_points(samples: np.ndarray, dataset: str) -> Image.Image:
    """Return samples from the prior beside as many true points."""
    means, std = modes(dataset)
    rng = np.random.default_rng(_PROGRESS_SEED)
    spread = std * rng.standard_normal(samples.shape)
    truth = means[rng.integers(len(means), size=len(samples))] + spread
    panels = [("true data", truth), ("G(z', z)", samples)]
    return density(panels, dataset, "Samples from the prior", side=360)


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file, the same for the same image."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _width(font: Any, text: str) -> int:
    return int(np.ceil(font.getlength(text)))


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
