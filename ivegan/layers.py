"""Layers of torch that compute the same, in ways that train faster; each says why.

Names, weights and results are those of the class that each derives from. All of it is for CPUs, but
for the bias of convolutions; elsewhere torch's own way is taken. ``benchmarks/layers.py`` measures
each alone.
"""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d, pad, pixel_shuffle

Network = TypeVar("Network", bound=nn.Module)


def plain(network: Network) -> Network:
    """Give a network torch's own layers in the place of those derived from them; return it."""
    for layer in network.modules():
        if type(layer).__module__ == __name__:
            layer.__class__ = next(
                c for c in type(layer).__mro__ if c.__module__.startswith("torch.")
            )
    return network


class Conv2d(nn.Conv2d):
    """A convolution whose bias is added afterwards.

    oneDNN computes a bias's gradient in a pass of its own that can cost as much as both others; a
    sum over the gradient is cheap.
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._biased(
            conv2d(input, self.weight, None, self.stride, cast(tuple[int, int], self.padding))
        )

    def _biased(self, out: Tensor) -> Tensor:
        return out if self.bias is None else out.add_(self.bias.to(out.dtype)[:, None, None])


class ImageConv2d(Conv2d):
    """A convolution of stride 1 and "same" padding to the few channels of an image.

    oneDNN computes sixteen channels at least. So a block of pixels is computed at a time, as the
    channels of a larger kernel that holds the small one at every place in the block.
    """

    def forward(self, input: Tensor) -> Tensor:
        channels, _, kernel, _ = self.weight.shape
        block = 4 if channels == 1 else 2
        sides = input.shape[2:]
        if input.device.type != "cpu" or kernel % 2 == 0 or any(s % block for s in sides):
            return super().forward(input)
        places = range(block)
        far = block - 1
        weights = [pad(self.weight, (c, far - c, r, far - r)) for r in places for c in places]
        weight = torch.stack(weights, dim=1).flatten(0, 1)
        out = conv2d(input, weight, None, block, kernel // 2)
        return self._biased(pixel_shuffle(out, block))


class ConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution whose bias is added afterwards, as in ``Conv2d``."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None
        padding = cast(tuple[int, int], self.padding)
        out = conv_transpose2d(
            input,
            self.weight,
            None,
            self.stride,
            padding,
            cast(tuple[int, int], self.output_padding),
        )
        return out if self.bias is None else out.add_(self.bias.to(out.dtype)[:, None, None])


class Linear(nn.Linear):
    """A dense layer from few units to many, as networks of points begin with.

    Its two gradients are products with one side of a few rows, for which MKL is several times
    faster if that side comes first.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not _usable(input):
            return super().forward(input)
        return cast(Tensor, _Linear.apply(input, self.weight, self.bias))


class Tanh(nn.Tanh):
    """tanh(x) = 2 sigmoid(2x) - 1, to 1e-7; MKL's own tanh takes several times as long."""

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, _Tanh.apply(input)) if _usable(input) else super().forward(input)


class StackedTanh(nn.Tanh):
    """The same tanh for ``torch.func.vmap``, which cannot look into a function of ours."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * torch.sigmoid(2 * input) - 1


def _usable(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and x.ndim == 2


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x, weight.t())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            (weight.t().contiguous() @ gradient.t()).t() if for_x else None,
            (x.t() @ gradient).t() if for_weight else None,
            gradient.sum(0) if for_bias else None,
        )


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = (2 * x).sigmoid_().mul_(2).sub_(1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        (y,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(gradient, y)
