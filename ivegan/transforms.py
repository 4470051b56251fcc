"""T(x): what the encoding must not depend on, batched and on the device.

T is a pure function of the samples and the random numbers from ``order.draw``. Pixels are uint8 in
storage and floats in [0, 1] everywhere else; both directions of that conversion stand here.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from ivegan.config import Transform
from ivegan.shapes import Float, UInt8

# RGB to luminance and two colour axes (NTSC's YIQ); a turn in the latter plane changes the hue.
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def to_float(images: UInt8[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Return stored pixels as floats in [0, 1]."""
    return images.float() / 255


def to_uint8(images: Float[Tensor, "n c h w"]) -> UInt8[Tensor, "n c h w"]:
    """Return floats in [0, 1] as stored pixels; the inverse of ``to_float``."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def transform(x: Float[Tensor, "n ..."], draws: Float[Tensor, "n ..."], t: Transform) -> Tensor:
    """Return T(x) for a batch of points (n, 2) or images (n, c, h, w), one T per sample.

    Args:
        x: points, or images with values in [0, 1].
        draws: offsets in a mode (n, 2) for points, uniforms on [0, 1) of shape (n, 7) for images.
        t: how far each part of T may go.
    """
    if x.ndim == 2:
        return x + t.noise_std * draws  # Eq. 4
    return _colour(_move(x, draws[:, :4], t), draws[:, 4:], t)


def _move(x: Tensor, draws: Tensor, t: Transform) -> Tensor:
    """Return images shifted, rotated and mirrored by one bilinear resampling."""
    if not (t.shift or t.rotate or t.flip):
        return x
    height, width = x.shape[2:]
    dx, dy, turn = (2 * draws[:, :3] - 1).unbind(1)  # uniform on [-1, 1)
    angle = turn * math.radians(t.rotate)
    mirror = torch.where(draws[:, 3] < 0.5, -1.0, 1.0) if t.flip else torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    # Output coordinates to input coordinates, both in [-1, 1] over the image.
    theta = torch.stack(
        (
            torch.stack((mirror * cos, -sin * height / width, dx * t.shift * 2 / width), dim=1),
            torch.stack((mirror * sin * width / height, cos, dy * t.shift * 2 / height), dim=1),
        ),
        dim=1,
    )
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    return grid_sample(x, grid, "bilinear", t.border, align_corners=False)


@functools.cache
def _yiq(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the matrix from RGB to YIQ and its inverse, constants of a captured step."""
    yiq = torch.tensor(_YIQ, dtype=dtype)
    return yiq.to(device), torch.linalg.inv(yiq).to(device)


def _colour(x: Tensor, draws: Tensor, t: Transform) -> Tensor:
    """Return images with brightness, contrast and hue changed a little, still in [0, 1]."""
    if not (t.brightness or t.contrast or t.hue):
        return x
    brightness, contrast, hue = (2 * draws - 1).unbind(1)
    yiq, rgb = _yiq(x.device, x.dtype)
    if t.brightness:
        x = x * (1 + t.brightness * brightness)[:, None, None, None]
    if t.contrast:
        weights = yiq[0] if x.shape[1] == 3 else x.new_ones(x.shape[1]) / x.shape[1]
        grey = torch.einsum("nchw,c->n", x, weights) / (x.shape[2] * x.shape[3])
        grey = grey[:, None, None, None]
        x = grey + (x - grey) * (1 + t.contrast * contrast)[:, None, None, None]
    if t.hue and x.shape[1] == 3:
        angle = 2 * math.pi * t.hue * hue
        cos, sin, one, zero = angle.cos(), angle.sin(), torch.ones_like(hue), torch.zeros_like(hue)
        rows = (one, zero, zero, zero, cos, -sin, zero, sin, cos)
        turn = torch.stack(rows, dim=1).unflatten(1, (3, 3))
        x = torch.einsum("nij,njhw->nihw", rgb @ turn @ yiq, x)
    return x.clamp(0, 1)
