"""The fast layers against torch's own: outputs, gradients, and gradients of gradients."""

import copy

import pytest
import torch
from ranks import in_ranks
from torch import Tensor, nn

from ivegan.layers import fast as layers

CASES = {
    "conv": (layers.Conv2d(3, 4, 5, 2, 2), (6, 3, 8, 8)),
    "grey image": (layers.ImageConv2d(16, 1, 5, padding=2), (3, 16, 8, 12)),
    "colour image": (layers.ImageConv2d(16, 3, 5, padding=2), (3, 16, 8, 12)),
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
def test_a_fast_layer_is_torchs_own_in_float64_and_bfloat16(case):
    torch.manual_seed(0)
    layer, shape = copy.deepcopy(CASES[case][0]), CASES[case][1]
    own = torchs_own(layer)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x), own(x), rtol=2e-2, atol=2e-2)
    x = x.double()
    for ours, theirs in zip(penalised(layer.double(), x), penalised(own.double(), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_batch_norm_over_ranks_is_batch_norm_over_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    world, shape = 2, (8, 3, 4, 5)
    layer, own = layers.SyncBatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 5
    own.load_state_dict(layer.state_dict())
    own.double().weight.data.copy_(torch.rand(shape[1]) + 1)
    layer.load_state_dict(own.state_dict())
    in_ranks(world, _norm_rank, layer.double(), x, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    *samples, weight, bias = penalised(own, x)
    for place, whole in enumerate(samples):
        together = torch.cat([rank["found"][place] for rank in ranks])
        torch.testing.assert_close(together, whole, rtol=1e-10, atol=1e-10)
    for place, whole in ((-2, weight), (-1, bias)):
        together = torch.stack([rank["found"][place] for rank in ranks]).sum(0)
        torch.testing.assert_close(together, whole, rtol=1e-10, atol=1e-10)
    for rank in ranks:
        torch.testing.assert_close(rank["buffers"], dict(own.named_buffers()))


def _norm_rank(rank: int, world: int, layer: nn.Module, x: Tensor, out: str) -> None:
    layer = copy.deepcopy(layer)  # what a process is given, it shares
    found = penalised(layer, x.chunk(world)[rank])
    buffers = dict(layer.named_buffers())
    torch.save({"found": found, "buffers": buffers}, f"{out}/{rank}.pt")
