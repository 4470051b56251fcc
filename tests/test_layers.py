"""The fast layers against torch's own: outputs, gradients, and gradients of gradients."""

import copy

import pytest
import torch
from torch import Tensor, nn

from ivegan import layers

CASES = {
    "conv": (layers.Conv2d(3, 4, 5, 2, 2), (6, 3, 8, 8)),
    "conv without bias": (layers.Conv2d(3, 4, 3, 1, 1, bias=False), (6, 3, 8, 8)),
    "grey image": (layers.ImageConv2d(16, 1, 5, padding=2), (3, 16, 8, 12)),
    "colour image": (layers.ImageConv2d(16, 3, 5, padding=2), (3, 16, 8, 12)),
    "colour image, small kernel": (layers.ImageConv2d(16, 3, 3, padding=1), (3, 16, 4, 4)),
    "grey image of few channels": (layers.ImageConv2d(8, 1, 5, padding=2), (16, 8, 32, 32)),
    "image of an odd side": (layers.ImageConv2d(16, 1, 3, padding=1), (3, 16, 7, 7)),
    "transposed conv": (layers.ConvTranspose2d(4, 3, 5, 2, 2, 1), (6, 4, 5, 5)),
}


def torchs_own(layer: nn.Module) -> nn.Module:
    """Return the same layer, of the class that ours derives from."""
    own = copy.deepcopy(layer)
    own.__class__ = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch."))
    assert type(own) is not type(layer)
    return own


def penalised(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Return outputs, and all gradients of a loss that has gradients in it, as R1 has."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (y.sin().sum() + slope.square().sum()).backward()
    assert x.grad is not None
    return [y.detach(), slope.detach(), x.grad, *(p.grad for p in layer.parameters())]  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("case", CASES)
def test_a_fast_layer_is_torchs_own(case):
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(CASES[case][0]).double(), CASES[case][1]
    own = torchs_own(layer)
    x = torch.randn(shape, dtype=torch.float64)
    for ours, theirs in zip(penalised(layer, x), penalised(own, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_in_training_precision_too(case, precision):
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(CASES[case][0]), CASES[case][1]
    own = torchs_own(layer)
    x = torch.randn(shape)
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        ours, theirs = layer(x), own(x)
    assert ours.dtype == theirs.dtype
    near = 1e-5 if precision == torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near)
