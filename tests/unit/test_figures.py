import io
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

from ivegan import order
from ivegan.config import Config, override, preset
from ivegan.evaluation import figures, plots
from ivegan.networks import EncoderGenerator


def images(count: int, channels: int = 1, side: int = 16) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(256, size=(count, channels, side, side), dtype=np.uint8)


def opened(page: Image.Image) -> np.ndarray:
    """Return the pixels of a page after a round trip through a PNG file."""
    with Image.open(io.BytesIO(figures.png(page))) as file:
        assert file.format == "PNG"
        return np.asarray(file.convert("RGB"))


def contains(page: np.ndarray, tile: np.ndarray) -> int:
    """Return how often a tile stands in a page, pixel for pixel."""
    height, width = tile.shape[:2]
    corners = np.argwhere((page == tile[0, 0]).all(axis=2))
    windows = (page[y : y + height, x : x + width] for y, x in corners)
    return sum(np.array_equal(window, tile) for window in windows)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_grid_shows_every_image_crisp_and_once(channels):
    shown = images(6, channels)
    page = opened(figures.sample_grid(shown, "Six", columns=3))
    for image in shown:
        pixels = np.broadcast_to(image.transpose(1, 2, 0), (16, 16, 3))
        assert contains(page, pixels.repeat(4, axis=0).repeat(4, axis=1)) == 1


def test_reconstruction_rows_stand_under_their_originals():
    x = images(3)
    page = opened(figures.reconstruction_rows(x, x[None], np.stack([x] * 2), "Rows"))
    tile = np.broadcast_to(x[1].transpose(1, 2, 0), (16, 16, 3)).repeat(4, 0).repeat(4, 1)
    assert contains(page, tile) == 4


def test_density_is_dark_on_the_modes_and_white_between_them():
    means, std = order.modes("ring")
    rng = np.random.default_rng(0)
    points = means[rng.integers(8, size=4000)] + std * rng.standard_normal((4000, 2))
    page = opened(figures.density([("true", points), ("true again", points)], "ring", "Ring"))
    left, top, side = 24, page.shape[0] - 24 - 260, 260
    panel = page[top : top + side, left : left + side]
    extent = 1.3 * 0.5
    for x, y in means:
        column, row = int((x + extent) / 2 / extent * side), int((extent - y) / 2 / extent * side)
        assert panel[row, column].sum() < 250, (x, y)
    assert panel[side // 2, side // 2].sum() > 750
    assert np.array_equal(panel, page[top : top + side, left + side + 20 :][:, :side])


def test_density_shows_upper_modes_above():
    points = np.array([[0.0, 0.5]] * 10)
    page = opened(figures.density([("up", points)], "ring", "Up"))
    rows = np.flatnonzero((page[-280:, 30:280].sum(axis=2) < 300).any(axis=1))
    assert rows.max() < 280 / 2


@pytest.mark.parametrize("dims", [2, 3])
def test_a_scatter_shows_every_class_in_its_colour(dims):
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=300)
    codes = rng.standard_normal((300, dims)) + 6 * np.eye(4)[labels][:, :dims]
    page = opened(plots.scatter(codes, labels, list("abcd"), "Codes", note="of four classes"))
    assert page.shape[:2] == (1035, 1170)
    for colour in figures.PALETTE[:4]:
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(page.astype(int) - wanted).max(axis=2) < 8).sum() > 20, colour


def small(name: str) -> tuple[EncoderGenerator, Config, np.ndarray | None]:
    config = override(preset(name), {"model.width": 0.25, "model.norm": "none"})
    if name == "mnist":
        config = override(config, {"model.norm": "batch"})
    torch.manual_seed(0)
    networks = EncoderGenerator(config.model)
    if config.is_points:
        return networks, config, None
    side = 16 if name == "digits" else 32
    return networks, config, images(12, side=side)


@pytest.mark.parametrize("name", ["ring", "digits"])
def test_progress_figures_are_the_same_for_the_same_weights(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not needed
    networks, config, originals = small(name)
    first = figures.progress_figures(networks, config, originals)
    torch.manual_seed(99)
    assert figures.progress_figures(networks, config, originals) == first
    assert set(first) == ({"samples"} if name == "ring" else {"samples", "reconstructions"})
    for content in first.values():
        with Image.open(io.BytesIO(content)) as page:
            assert np.asarray(page).std() > 5


def test_progress_figures_leave_training_as_it_was():
    networks, config, originals = small("mnist")
    networks.train()
    networks.generator.eval()
    before = deepcopy(networks.state_dict())
    figures.progress_figures(networks, config, originals)
    assert networks.encoder.training
    assert not networks.generator.training
    for name, value in networks.state_dict().items():
        assert torch.equal(value, before[name]), name
