"""Layers of torch that compute the same, in ways that train faster; each says why.

Names, weights and results are those of the class that each derives from. All of it is for CPUs, but
for the bias of convolutions; elsewhere torch's own way is taken. Batch norm over ranks is the
exception: it is here for what torch's own cannot do.
"""

import contextlib
import ctypes
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
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
        # From fewer than 16 channels oneDNN's bfloat16 on AMX computes such a convolution wrongly.
        few = self.in_channels < 16
        if few or input.device.type != "cpu" or kernel % 2 == 0 or any(s % block for s in sides):
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


class _OverRanks(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the samples of all ranks, of which every one has equally many.

    Torch's own has no way for CPUs, and no gradient of gradients.
    """

    def forward(self, input: Tensor) -> Tensor:
        several = dist.is_initialized() and dist.get_world_size() > 1
        if not (self.training and several):
            return super().forward(input)
        ranks, dims = dist.get_world_size(), [d for d in range(input.dim()) if d != 1]
        # A row for each rank, because a variance from one sum of squares would cancel.
        own = torch.stack(torch.var_mean(input.to(self.weight.dtype), dims, correction=0))
        rows = torch.stack(
            [own if r == dist.get_rank() else torch.zeros_like(own) for r in range(ranks)]
        )
        var, mean = _SumOverRanks.apply(rows).unbind(1)
        var, mean = var.mean(0) + mean.var(0, correction=0), mean.mean(0)
        self._remember(mean.detach(), var.detach(), ranks * input.numel() // input.shape[1])
        scale = self.weight * (var + self.eps).rsqrt()
        shape = (-1, *(1 for _ in dims[1:]))
        out = input * scale.view(shape) + (self.bias - mean * scale).view(shape)
        return out.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics as torch does."""
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)


class SyncBatchNorm1d(_OverRanks, nn.BatchNorm1d):
    """Of units."""


class SyncBatchNorm2d(_OverRanks, nn.BatchNorm2d):
    """Of channels."""


class _SumOverRanks(Function):
    """A sum over all ranks that gradients, and gradients of gradients, go through."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.clone()
        dist.all_reduce(rows)
        return rows

    @staticmethod
    def backward(ctx: Any, *slope: Tensor) -> Any:
        return _SumOverRanks.apply(*slope)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, on Linux with the GNU C library.

    A tensor of 32 MB or more is otherwise a fresh mapping every time, whose pages the kernel clears
    one by one; a step would spend a sixth of its time on that. Peak memory is the same.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 2**26)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
