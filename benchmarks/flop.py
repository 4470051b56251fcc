"""Floating-point operations of the networks and of a step, and the machine's rates beside them."""

import time
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ivegan.config import Config
from ivegan.layers import plain
from ivegan.networks import Discriminators, EncoderGenerator, sample_shape


def wait(device: str) -> None:
    """Wait for a GPU to be done; a CPU is."""
    if device == "cuda":
        torch.cuda.synchronize()


def flop_by_formula(network: nn.Module, *inputs: Tensor) -> int:
    """Return multiplications and additions of one forward pass, from the shapes of its layers."""
    network = plain(deepcopy(network))  # layers of ours hide theirs from hooks
    total = 0

    def count(layer: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        per_output = layer.weight[0].numel()
        places = out.numel()
        if isinstance(layer, nn.ConvTranspose2d):  # the roles of input and output are exchanged
            places = given[0].numel()
        total += 2 * places * per_output

    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, kinds)]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return total


def flop_by_counter(network: nn.Module, *inputs: Tensor) -> int:
    """Return the same by torch's counter, which sees what is computed, not what is meant."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()


def of_networks(config: Config) -> dict[str, dict[str, float]]:
    """Return the operations per image of a forward pass of each network, both ways."""
    n, m = 4, config.model
    players, judges = EncoderGenerator(m).eval(), Discriminators(m).eval()
    x = torch.rand(n, *sample_shape(m))
    noise, z = torch.rand(n, m.noise_dim), torch.rand(n, m.z_dim)
    with torch.no_grad():
        features = judges.trunk(x)
        cases: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
            "E": (players.encoder, (x,)),
            "G": (players.generator, (noise, z)),
            "trunk": (judges.trunk, (x,)),
            "D head": (judges.pair_head, (torch.cat((features, features), 1),)),
            "D' head": (judges.sample_head, (features,)),
        }
        return {
            name: {
                "formula": flop_by_formula(network, *given) / n,
                "counter": flop_by_counter(network, *given) / n,
            }
            for name, (network, given) in cases.items()
        }


def of_step(of: dict[str, dict[str, float]]) -> float:
    """Return the operations per image of a step, as the mathematics needs them.

    A backward pass costs twice a forward pass, once per operand; once, where weights are frozen.
    D's phase sees four batches through the trunk and trains it. E's and G's phase sees three of
    them again, x and the two that G made, and takes gradients through the latter. G makes two
    batches, E one code. (Batch norm wants T(x) in that phase too, for its statistics.)
    """
    E, G, trunk, pair, sample = (of[k]["formula"] for k in ("E", "G", "trunk", "D head", "D' head"))
    heads = pair + sample
    return 3 * (E + 2 * G) + 3 * (4 * trunk + 2 * heads) + (3 + 2) * trunk + 2 * heads


def rates(device: str, precision: torch.dtype) -> tuple[float, float]:
    """Return the best rates of the machine: operations of a matrix product, bytes of a copy."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=precision)
    source = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    product = copy = float("inf")
    for _ in range(7):
        for which in ("product", "copy"):
            wait(device)
            start = time.perf_counter()
            if which == "product":
                torch.mm(a, a)
            else:
                target.copy_(source)
            wait(device)
            took = time.perf_counter() - start
            product, copy = (
                (min(product, took), copy) if which == "product" else (product, min(copy, took))
            )
    return 2 * n**3 / product, 2 * source.numel() * source.element_size() / copy
