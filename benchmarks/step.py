"""Time the train step alone, data in memory and T included, or the textbook loop beside it.

    python benchmarks/step.py digits --device cpu
    python benchmarks/step.py mnist --device cpu --model.width 0.25 --rounds 7
    python benchmarks/step.py celeba --device cuda --reference

``--rounds N`` alternates the loops N times in one process and reports ratios; an absolute rate says
little on a machine that is shared. ``--variant NAME`` adds our step with one thing done otherwise.
Needs no more than ``import ivegan`` does. The last line is one JSON object.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from common import arguments, configured, facts, in_turns, ratio
from flop import of_networks, of_step, rates, wait
from textbook import steps as textbook_steps

from ivegan import order, seeds
from ivegan.config import Config
from ivegan.data.batches import Split, batches
from ivegan.layers import keep_freed_memory, plain
from ivegan.networks import sample_shape
from ivegan.step import create_state, train_step

WARM_UP = 3  # steps
VARIANTS = ("float32", "plain layers", "contiguous", "foreach Adam", "compiled")


def samples_of(config: Config, count: int = 4096) -> np.ndarray:
    """Return random images, uint8, or points: the time does not depend on what they show."""
    random = np.random.default_rng(0)
    if config.is_points:
        means, std = order.modes(config.dataset)
        chosen = means[random.integers(len(means), size=100_000)]
        return (chosen + std * random.standard_normal(chosen.shape)).astype(np.float32)
    return random.integers(0, 256, (count, *sample_shape(config.model)), dtype=np.uint8)


def our_steps(
    config: Config,
    samples: np.ndarray,
    device: str,
    precision: str = "float32",
    variant: str = "",
    parts: int = 1,
) -> Iterator[int]:
    """Train with the project's step, yielding after every step.

    Args:
        config: of the run.
        samples: images or points.
        device: where to train.
        precision: of the networks.
        variant: one of ``VARIANTS``: our step with one thing done otherwise.
        parts: that a batch is computed in.
    """
    if variant == "float32":
        precision = "float32"
    if device == "cpu":
        keep_freed_memory()
    state = create_state(config, device, getattr(torch, precision))
    state.parts = parts
    for network in (state.players, state.judges):
        if variant == "plain layers":
            plain(network)
        if variant == "contiguous":
            network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        if variant == "compiled":
            network.compile(dynamic=False)
    if variant == "foreach Adam":
        for optimizer in (state.optimizer_g, state.optimizer_d):
            optimizer.param_groups[0].update(fused=False, foreach=True)
    split = None
    if not config.is_points:
        labels = np.zeros(len(samples), np.int64)
        split = Split(images=samples, labels=labels, keys=[], dataset_hash="")
    for x, draws in batches(config, split, 0, 0, 1, state.device):
        train_step(state, x, draws)
        yield state.step


def rate(steps: Iterator[int], batch_size: int, seconds: float, device: str) -> float:
    """Return images per second over about so many seconds, and at least two steps."""
    wait(device)
    start = time.perf_counter()
    count = 0
    while count < 2 or time.perf_counter() - start < seconds:
        next(steps)
        count += 1
    wait(device)
    return count * batch_size / (time.perf_counter() - start)


def many_seeds(config: Config, count: int, device: str) -> dict[str, Iterator[int]]:
    """Return loops over so many games on points that differ in their seed: at once, in sequence."""
    numbers = list(range(count))

    def at_once() -> Iterator[int]:
        state = seeds.stack(config, numbers, device)
        for x, draws in seeds.batches(config, numbers, device):
            train_step(state, x, draws)
            yield state.step

    def in_sequence() -> Iterator[int]:
        games = [dataclasses.replace(config, seed=number) for number in numbers]
        samples = samples_of(config)
        alone = [our_steps(game, samples, device) for game in games]
        while True:
            yield max([next(steps) for steps in alone])

    return {"ours": at_once(), "one seed after the other": in_sequence()}


def main() -> None:
    """Print a line per round and one JSON object."""
    parser = arguments("Time the train step")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--reference", action="store_true", help="time the textbook loop instead")
    parser.add_argument("--rounds", type=int, help="alternate both loops, and report the ratio")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        choices=VARIANTS,
        help="with --rounds: time our step with this done otherwise, too",
    )
    parser.add_argument("--seeds", type=int, help="of points: so many games, at once or one by one")
    parser.add_argument("--loader-workers", type=int, default=2, help="of the textbook's loader")
    options = parser.parse_args()
    if options.reference:
        options.precision = "float32"
    config = configured(options)
    samples = samples_of(config)
    device, workers = options.device, options.loader_workers
    if options.seeds and not config.is_points:
        parser.error("--seeds is for ring and grid: only games on points are played at once.")

    loops: dict[str, Iterator[int]] = {}
    if options.seeds:
        loops = many_seeds(config, options.seeds, device)
    elif not options.reference:
        loops["ours"] = our_steps(config, samples, device, options.precision)
    if not options.seeds and (options.reference or options.rounds):
        loops["textbook"] = textbook_steps(config, samples, device, workers)
    for variant in options.variant if options.rounds else []:
        loops[variant] = our_steps(config, samples, device, options.precision, variant)
    for steps in loops.values():
        for _ in range(WARM_UP):
            next(steps)
    images = config.batch_size * (options.seeds or 1)
    turns = {
        name: functools.partial(rate, steps, images, options.seconds, device)
        for name, steps in loops.items()
    }
    found = in_turns(turns, options.rounds or 1, "images/s")
    medians = {name: statistics.median(v) for name, v in found.items()}
    first = next(iter(loops))
    flop = of_step(of_networks(config))
    peak, _ = rates(device, getattr(torch, options.precision))
    report = {
        **facts(options, config),
        "loop": first,
        "images_per_second": medians[first],
        "flop_per_image": flop,
        "share_of_peak": medians[first] * flop / peak,
        "loops": medians,
        "ours_to": {
            name: ratio(found["ours"], theirs)
            for name, theirs in found.items()
            if name != "ours" and "ours" in found
        },
    }
    for name, measured in report["ours_to"].items():
        least, most = measured["range"]
        print(f"ours / {name}: {measured['ratio']:.2f} ({least:.2f} to {most:.2f})")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
