"""Time the train step alone, data in memory and T included, or the textbook loop beside it.

    python benchmarks/step.py digits --device cpu
    python benchmarks/step.py mnist --device cpu --model.width 0.25 --rounds 7
    python benchmarks/step.py celeba --device cuda --reference

``--rounds N`` alternates the loops N times in one process and reports ratios; an absolute rate
means little on a shared machine. Needs only the packages that ``import ivegan`` needs. The last
line is one JSON object.
"""

import functools
import json
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from common import arguments, configured, in_turns, metadata, random_samples, rate, ratio, wait
from textbook import steps as textbook_steps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ivegan.config import Config
from ivegan.data.batches import batches
from ivegan.data.cache import Split
from ivegan.layers.fast import keep_freed_memory, plain
from ivegan.networks import Discriminators, EncoderGenerator, sample_shape
from ivegan.step import create_state, train_step

WARM_UP = 3  # steps


def our_steps(config: Config, samples: np.ndarray, device: str, precision: str) -> Iterator[int]:
    """Train with the project's step, yielding after every step."""
    if device == "cpu":
        keep_freed_memory()
    state = create_state(config, device, getattr(torch, precision))
    split = None
    if not config.is_points:
        labels = np.zeros(len(samples), np.int64)
        split = Split(images=samples, labels=labels, keys=[], dataset_hash="")
    for x, draws in batches(config, split, 0, 0, 1, state.device):
        train_step(state, x, draws)
        yield state.step


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


def main() -> None:
    """Print a line per round and one JSON object."""
    parser = arguments("Time the train step")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--reference", action="store_true", help="time the textbook loop instead")
    parser.add_argument("--rounds", type=int, help="alternate both loops, and report the ratio")
    parser.add_argument("--loader-workers", type=int, default=2, help="of the textbook's loader")
    options = parser.parse_args()
    if options.reference:
        options.precision = "float32"
    config, device = configured(options), options.device
    samples = random_samples(config)
    loops: dict[str, Iterator[int]] = {}
    if not options.reference:
        loops["ours"] = our_steps(config, samples, device, options.precision)
    if options.reference or options.rounds:
        loops["textbook"] = textbook_steps(config, samples, device, options.loader_workers)
    for steps in loops.values():
        for _ in range(WARM_UP):
            next(steps)
    turns = {
        name: functools.partial(rate, steps, config.batch_size, options.seconds, device)
        for name, steps in loops.items()
    }
    rates = in_turns(turns, options.rounds or 1, "images/s")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    loop, flop = next(iter(loops)), step_flop(config)
    peak = peak_rate(device, getattr(torch, options.precision))
    report = {
        **metadata(options, config),
        "loop": loop,
        "images_per_second": medians[loop],
        "flop_per_image": flop,
        "share_of_peak": medians[loop] * flop / peak,
        "loops": medians,
        "ours_to": {k: ratio(rates[loop], v) for k, v in rates.items() if loop == "ours" != k},
    }
    if device == "cuda":
        report["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
