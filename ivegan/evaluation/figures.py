"""Grids of images and densities: arrays in, pillow images out; a run's figures, as PNGs.

All is drawn with pillow alone, because training draws it too and runs without matplotlib; scatter
plots are in ``plots``. Each picture has a title and a note above it, one line each.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ivegan import order
from ivegan.config import PROTOCOLS, Config
from ivegan.networks import EncoderGenerator, in_eval_mode
from ivegan.shapes import Float, UInt8
from ivegan.transforms import to_float, to_uint8

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
    """Return whole rows of images (Fig. 3 of the paper); a rest is left out."""
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
    """Return originals above draws of T(x), of which there may be none, and of G(z', E(x))."""
    labels = ["x", *["T(x)"] * len(transformed), *["G(z', E(x))"] * len(x_hat)]
    rows, breaks = np.concatenate((x[None], transformed, x_hat)), {1, 1 + len(transformed)}
    return image_rows(rows, title, note=note, row_labels=labels, breaks=tuple(breaks))


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
        row_labels: one per row, at its left; a label like the one above it is not repeated.
        breaks: rows that are set off by a wider gap above them.
        column_breaks: columns that are set off by a wider gap at their left.
    """
    num_rows, num_columns, channels, height, width = images.shape
    scale = max(1, round(64 / height))
    tile_h, tile_w, gap, wide = height * scale, width * scale, 6, 18
    text = _font(_TEXT)
    label_w = max((_width(text, label) for label in row_labels), default=0)
    left = label_w + 16 if label_w else 0
    xs = [left + i * (tile_w + gap) + wide * sum(b <= i for b in column_breaks if b)
          for i in range(num_columns)]  # fmt: skip
    ys = [i * (tile_h + gap) + wide * sum(b <= i for b in breaks if b)
          for i in range(num_rows)]  # fmt: skip
    page, top = _page(xs[-1] + tile_w, ys[-1] + tile_h, title, note)
    draw = ImageDraw.Draw(page)
    for row, y in enumerate(ys):
        if label_w and (row == 0 or row_labels[row] != row_labels[row - 1]):
            draw.text((_MARGIN, top + y + tile_h / 2), row_labels[row], INK, text, anchor="lm")
        for column, x in enumerate(xs):
            pixels = images[row, column].transpose(1, 2, 0)
            tile = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
            tile = tile.resize((tile_w, tile_h), Image.Resampling.NEAREST)
            page.paste(tile, (_MARGIN + x, top + y))
    return page


def _page(width: int, height: int, title: str, note: str) -> tuple[Image.Image, int]:
    """Return an empty page for a picture of this size under a title, and where it begins."""
    titles, text = _font(_TITLE), _font(_TEXT)
    width = max(width, _width(titles, title), _width(text, note))
    top = _MARGIN + (64 if note else 40)
    page = Image.new("RGB", (width + 2 * _MARGIN, top + height + _MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, INK, titles)
    draw.text((_MARGIN, _MARGIN + 30), note, MUTED, text)
    return page, top


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
        side: pixels of one panel.
    """
    columns, gap, name_h = min(4, len(panels)), 20, 28
    rows = -(-len(panels) // columns)
    size = columns * (side + gap) - gap, rows * (side + name_h + gap) - gap
    page, top = _page(*size, title, note)
    draw, text = ImageDraw.Draw(page), _font(_TEXT)
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
    means, _ = order.modes(dataset)
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
    stops = np.array([ImageColor.getrgb(c) for c in _DENSITY], dtype=np.float64)
    place = np.sqrt(values.clip(0, 1)) * (len(stops) - 1)
    low = place.astype(int).clip(0, len(stops) - 2)
    share = (place - low)[..., None]
    return Image.fromarray((stops[low] * (1 - share) + stops[low + 1] * share).astype(np.uint8))


# --- Training -----------------------------------------------------------------------------------


@torch.no_grad()
def progress_figures(
    networks: EncoderGenerator, config: Config, originals: np.ndarray | None
) -> dict[str, bytes]:
    """Return PNGs of the progress of training, at the same z, z' and originals all through a run.

    ``originals`` are uint8 images to make variations of; None for points.
    """
    draws = torch.Generator().manual_seed(_PROGRESS_SEED)
    device = next(networks.parameters()).device
    count = 10_000 if config.is_points else 60
    z = order.prior(count, config.model.z_dim, draws).to(device)
    noise = torch.randn(count, config.model.noise_dim, generator=draws).to(device)
    with in_eval_mode(networks):
        samples = networks.generator(noise, z).cpu()
        if originals is None:
            truth = order.sample_points(
                config.dataset, count, draws, PROTOCOLS[config.protocol]
            ).numpy()
            panels = [("true data", truth), ("G(z', z)", samples.numpy())]
            pages = {"samples": density(panels, config.dataset, "Samples from the prior", side=360)}
        else:
            x = np.array(originals)
            codes = networks.encoder(to_float(torch.from_numpy(x)).to(device))
            rows = [networks.generator(row, codes) for row in noise[: 4 * len(x)].split(len(x))]
            x_hat = np.stack([to_uint8(row.cpu()).numpy() for row in rows])
            title = "Originals and their variations"
            pages = {
                "samples": sample_grid(to_uint8(samples).numpy(), "Samples from the prior"),
                "reconstructions": reconstruction_rows(x, x_hat[:0], x_hat, title),
            }
    return {name: png(page) for name, page in pages.items()}


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file, the same for the same image."""
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _width(font: Any, text: str) -> int:
    return int(np.ceil(font.getlength(text)))
