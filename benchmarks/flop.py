"""Floating-point operations of a step by formula, and the machine's rate of matrix products."""

import time

import torch
from common import wait
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ivegan.config import Config
from ivegan.layers.fast import plain
from ivegan.networks import Discriminators, EncoderGenerator, sample_shape


def forward_flop(network: nn.Module, *inputs: Tensor) -> float:
    """Return multiplications and additions per sample of one forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(network)(*inputs)
    return counter.get_total_flops() / len(inputs[0])


def step_flop(config: Config) -> float:
    """Return the operations per image of a step, as the mathematics needs them.

    A backward pass costs twice a forward pass, once per operand; once where weights are frozen.
    The phase of D sees four batches through the trunk and trains it. The phase of E and G sees
    three of them again, x and the two that G made, and takes gradients through the latter. G makes
    two batches, E one code.
    """
    n, m = 4, config.model
    generators, discriminators = EncoderGenerator(m).eval(), Discriminators(m).eval()
    x = torch.rand(n, *sample_shape(m))
    noise, z = torch.rand(n, m.noise_dim), torch.rand(n, m.z_dim)
    with torch.no_grad():
        features = discriminators.trunk(x)
    E = forward_flop(generators.encoder, x)
    G = forward_flop(generators.generator, noise, z)
    trunk = forward_flop(discriminators.trunk, x)
    heads = forward_flop(discriminators.pair_head, torch.cat((features, features), 1))
    heads += forward_flop(discriminators.sample_head, features)
    return 3 * (E + 2 * G) + 3 * (4 * trunk + 2 * heads) + (3 + 2) * trunk + 2 * heads


def peak_rate(device: str, precision: torch.dtype) -> float:
    """Return the machine's best rate of matrix products, in operations per second."""
    n = 8192 if device == "cuda" else 2048
    matrix = torch.randn(n, n, device=device, dtype=precision)
    best = float("inf")
    for _ in range(7):
        wait(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
