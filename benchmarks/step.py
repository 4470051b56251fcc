"""Time the train step alone, data in memory and T included, or the textbook loop beside it.

    python benchmarks/step.py digits --device cpu
    python benchmarks/step.py mnist --device cpu --model.width 0.25 --rounds 7
    python benchmarks/step.py celeba --device cuda --reference

``--rounds N`` alternates the loops N times in one process and reports ratios; an absolute rate says
little on a machine that is shared. ``--variant NAME`` adds our step with one thing done otherwise.
Needs no more than ``import ivegan`` does. The last line is one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from textbook import steps as textbook_steps

from ivegan import order
from ivegan.config import PRESETS, Config, override, preset
from ivegan.data import Split, batches
from ivegan.layers import plain
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
    config: Config, samples: np.ndarray, device: str, precision: str = "float32", variant: str = ""
) -> Iterator[int]:
    """Train with the project's step, yielding after every step.

    Args:
        config: of the run.
        samples: images or points.
        device: where to train.
        precision: of the networks.
        variant: one of ``VARIANTS``: our step with one thing done otherwise.
    """
    if variant == "float32":
        precision = "float32"
    state = create_state(config, device, getattr(torch, precision))
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


def wait(device: str) -> None:
    """Wait for a GPU to be done; a CPU is."""
    if device == "cuda":
        torch.cuda.synchronize()


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


def main() -> None:
    """Print a line per round and one JSON object."""
    parser = argparse.ArgumentParser(description="Time the train step")
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--model.width", dest="width", type=float)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--reference", action="store_true", help="time the textbook loop instead")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, help="alternate both loops, and report the ratio")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        choices=VARIANTS,
        help="with --rounds: time our step with this done otherwise, too",
    )
    parser.add_argument("--loader-workers", type=int, default=2, help="of the textbook's loader")
    options = parser.parse_args()
    changes = {"batch_size": options.batch_size, "model.width": options.width}
    config = preset(options.preset)
    config = override(config, {k: v for k, v in changes.items() if v is not None})
    samples = samples_of(config)

    loops: dict[str, Iterator[int]] = {}
    if not options.reference:
        loops["ours"] = our_steps(config, samples, options.device, options.precision)
    if options.reference or options.rounds:
        workers = options.loader_workers
        loops["textbook"] = textbook_steps(config, samples, options.device, workers)
    for variant in options.variant if options.rounds else []:
        loops[variant] = our_steps(config, samples, options.device, options.precision, variant)
    for steps in loops.values():
        for _ in range(WARM_UP):
            next(steps)
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(options.rounds or 1):
        for name in loops if number % 2 == 0 else reversed(loops):
            found[name].append(
                rate(loops[name], config.batch_size, options.seconds, options.device)
            )
        print("  ".join(f"{k} {v[-1]:,.0f} images/s" for k, v in found.items()), flush=True)
    report = {
        "preset": options.preset,
        "batch_size": config.batch_size,
        "width": config.model.width,
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "images_per_second": {name: statistics.median(v) for name, v in found.items()},
        "ours_to": {},
    }
    for name, theirs in found.items():
        if name != "ours" and "ours" in found:
            ratios = [a / b for a, b in zip(found["ours"], theirs, strict=True)]
            middle, ends = statistics.median(ratios), [min(ratios), max(ratios)]
            report["ours_to"][name] = {"ratio": middle, "range": ends}
            print(f"ours / {name}: {middle:.2f} ({ends[0]:.2f} to {ends[1]:.2f})")
    print(json.dumps(report))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
