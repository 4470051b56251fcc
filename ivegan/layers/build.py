"""Layers of the networks, from the rows of a table, and their first weights."""

import itertools

import torch
from torch import nn

from ivegan.config import Model, Norm
from ivegan.layers import fast
from ivegan.layers.tables import Architecture, Conv

SLOPE = 0.2  # of every LeakyReLU, Tables 2 and 3


def wide(count: int, model: Model) -> int:
    """Return a hidden size scaled by ``model.width``, in multiples of 4, never under 4."""
    return count if model.width == 1 else max(4, round(count * model.width / 4) * 4)


def hidden_units(model: Model, table: Architecture) -> list[int]:
    return [wide(units, model) for units in table.hidden]


def dense(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Return dense layers of these sizes with an activation between any two."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        leaky = activation is nn.LeakyReLU
        layers += [nn.Linear(a, b), nn.LeakyReLU(SLOPE, inplace=True) if leaky else activation()]
    return nn.Sequential(*layers[:-1])


def conv_body(model: Model, table: Architecture, last: int, kind: Norm) -> nn.Sequential:
    """Return the convolutions of a table, flattened into one dense layer of ``last`` units."""
    channels, side, _ = table.shape
    layers: list[nn.Module] = []
    for conv in table.convs:
        out = wide(conv.filters, model)
        valid = conv.kernel == side  # the 2x2 convolution that ends Tables 2 and 3
        padding, norm = 0 if valid else conv.kernel // 2, norm2d(kind, out, conv)
        layers += [
            fast.Conv2d(channels, out, conv.kernel, conv.stride, padding, bias=not is_batch(norm)),
            *norm,
            nn.LeakyReLU(SLOPE, inplace=True),
        ]
        channels, side = out, 1 if valid else -(-side // conv.stride)
    layers += [nn.Flatten(), nn.Linear(channels * side * side, last)]
    return nn.Sequential(*layers)


def deconv(
    channels: int, out: int, conv: Conv, *, bias: bool = True, image: bool = False
) -> list[nn.Module]:
    """Return a transposed convolution whose output is exactly ``stride`` times its input."""
    kernel, stride = conv.kernel, conv.stride
    if stride == 1:
        # A stride-1 transposed convolution is a convolution with a mirrored kernel; SAME padding
        # of an even kernel is one pixel more on the far side.
        near, far = (kernel - 1) // 2, kernel // 2
        pad = [nn.ZeroPad2d((near, far, near, far))] if near != far else []
        kind = fast.ImageConv2d if image else fast.Conv2d
        return [*pad, kind(channels, out, kernel, padding=0 if pad else near, bias=bias)]
    padding = max(0, -(-(kernel - stride) // 2))
    extra = stride - kernel + 2 * padding
    return [fast.ConvTranspose2d(channels, out, kernel, stride, padding, extra, bias=bias)]


def is_batch(norm: list[nn.Module]) -> bool:
    """Return whether these are a batch norm, which cancels any bias before it."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in norm)


def norm2d(kind: Norm, channels: int, conv: Conv) -> list[nn.Module]:
    if not conv.norm or kind == "none":
        return []
    if kind == "group":
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
        return [nn.GroupNorm(groups, channels)]
    return [fast.SyncBatchNorm2d(channels) if kind == "sync" else nn.BatchNorm2d(channels)]


def norm1d(kind: Norm, units: int) -> list[nn.Module]:
    if kind == "none":
        return []
    if kind == "group":
        return [nn.LayerNorm(units)]
    return [fast.SyncBatchNorm1d(units) if kind == "sync" else nn.BatchNorm1d(units)]


def initialise(network: nn.Module, seed: int) -> None:
    """Set every weight by the tables: He before a LeakyReLU, Xavier elsewhere, biases zero.

    Drawn from a generator of its own, so that the result depends on nothing but the seed. The fan
    of a strided transposed convolution is what really reaches one output: in * kernel² / stride².
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in network.modules() if not list(m.children())]
    layers = [m for m in layers if not isinstance(m, _NORMS)]
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            continue
        fan_in, fan_out = _fans(layer)
        he = isinstance(following, nn.LeakyReLU)
        std = (2 / (1 + SLOPE**2) / fan_in if he else 2 / (fan_in + fan_out)) ** 0.5
        with torch.no_grad():
            layer.weight.normal_(0, std, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def _fans(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> tuple[float, float]:
    """Return how many inputs reach one output, and how many outputs one input reaches."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    area, stride = layer.kernel_size[0] * layer.kernel_size[1], layer.stride[0] * layer.stride[1]
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.in_channels * area / stride, layer.out_channels * area
    return layer.in_channels * area, layer.out_channels * area / stride
