import io
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

from ivegan import order
from ivegan.config import override, preset
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
def test_grids_show_every_image_crisp_and_as_often_as_it_comes(channels):
    x = images(6, channels)
    grid = opened(figures.sample_grid(x, "Six", columns=3))
    rows = opened(figures.reconstruction_rows(x, x[None], np.stack([x] * 2), "Rows"))
    for image in x:
        tile = np.broadcast_to(image.transpose(1, 2, 0), (16, 16, 3)).repeat(4, 0).repeat(4, 1)
        assert (contains(grid, tile), contains(rows, tile)) == (1, 4)


def test_density_is_dark_on_the_modes_and_white_between_them():
    means, std = order.modes("ring")
    means = means[means[:, 1] >= 0]  # the upper half: what is up is shown above
    rng = np.random.default_rng(0)
    points = means[rng.integers(len(means), size=4000)] + std * rng.standard_normal((4000, 2))
    page = opened(figures.density([("true", points), ("true again", points)], "ring", "Ring"))
    left, top, side = 24, page.shape[0] - 24 - 260, 260
    panel = page[top : top + side, left : left + side]
    extent = 1.3 * 0.5
    for x, y in means:
        column, row = int((x + extent) / 2 / extent * side), int((extent - y) / 2 / extent * side)
        assert panel[row, column].sum() < 250, (x, y)
    assert panel[side // 2, side // 2].sum() > 750
    assert panel[3 * side // 4 :].sum(axis=2).min() > 600
    assert np.array_equal(panel, page[top : top + side, left + side + 20 :][:, :side])


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


@pytest.mark.parametrize("name", ["ring", "digits"])
def test_progress_figures_are_the_same_again_and_leave_training_as_it_was(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # not needed
    norm = "none" if name == "ring" else "batch"
    config = override(preset(name), {"model.width": 0.25, "model.norm": norm})
    networks = EncoderGenerator(config.model).train()
    networks.generator.eval()
    before = deepcopy(networks.state_dict())
    originals = None if name == "ring" else images(12)
    first = figures.progress_figures(networks, config, originals)
    torch.manual_seed(99)
    assert figures.progress_figures(networks, config, originals) == first
    assert set(first) == ({"samples"} if name == "ring" else {"samples", "reconstructions"})
    for content in first.values():
        with Image.open(io.BytesIO(content)) as page:
            assert np.asarray(page).std() > 5
    assert networks.encoder.training
    assert not networks.generator.training
    for entry, value in networks.state_dict().items():
        assert torch.equal(value, before[entry]), entry
