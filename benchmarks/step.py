"""Time the train step alone, data in memory and T included, or the textbook loop beside it.

    python benchmarks/step.py digits --device cpu
    python benchmarks/step.py mnist --device cpu --model.width 0.25 --rounds 7
    python benchmarks/step.py celeba --device cuda --reference

``--rounds N`` alternates the two loops N times in one process and reports the ratio; an absolute
rate says little on a machine that is shared. Needs no more than ``import ivegan`` does. The last
line is one JSON object.
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
from torch.utils.flop_counter import FlopCounterMode

from ivegan import order
from ivegan.config import PRESETS, Config, override, preset
from ivegan.data import Split, batches
from ivegan.networks import sample_shape
from ivegan.step import create_state, train_step

WARM_UP = 3  # steps


def samples_of(config: Config, count: int = 4096) -> np.ndarray:
    """Return random images, uint8, or points: the time does not depend on what they show."""
    random = np.random.default_rng(0)
    if config.is_points:
        means, std = order.modes(config.dataset)
        chosen = means[random.integers(len(means), size=100_000)]
        return (chosen + std * random.standard_normal(chosen.shape)).astype(np.float32)
    return random.integers(0, 256, (count, *sample_shape(config.model)), dtype=np.uint8)


def our_steps(
    config: Config, samples: np.ndarray, device: str, precision: str = "float32"
) -> Iterator[int]:
    """Train with the project's step, yielding after every step."""
    state = create_state(config, device, getattr(torch, precision))
    split = None
    if not config.is_points:
        labels = np.zeros(len(samples), np.int64)
        split = Split(images=samples, labels=labels, keys=[], dataset_hash="")
    for x, draws in batches(config, split, 0, 0, 1, state.device):
        train_step(state, x, draws)
        yield state.step


def flop_per_image(config: Config, samples: np.ndarray) -> float:
    """Return the multiplications and additions of one step, by torch's counter, per image."""
    small = override(config, {"batch_size": 8})
    running = our_steps(small, samples, "cpu")
    next(running)
    with FlopCounterMode(display=False) as counter:
        next(running)
    return counter.get_total_flops() / 8


def matrix_rate(device: str) -> float:
    """Return floating-point operations per second of a large float32 matrix product."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device)
    best = 0.0
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        wait(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


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
    parser.add_argument("--loader-workers", type=int, default=2, help="of the textbook's loader")
    options = parser.parse_args()
    changes = {"batch_size": options.batch_size, "model.width": options.width}
    config = preset(options.preset)
    config = override(config, {k: v for k, v in changes.items() if v is not None})
    samples = samples_of(config)
    flop, peak = flop_per_image(config, samples), matrix_rate(options.device)

    loops: dict[str, Iterator[int]] = {}
    if not options.reference:
        loops["ours"] = our_steps(config, samples, options.device, options.precision)
    if options.reference or options.rounds:
        workers = options.loader_workers
        loops["textbook"] = textbook_steps(config, samples, options.device, workers)
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
    main_loop = next(iter(loops))
    images_per_second = statistics.median(found[main_loop])
    report = {
        "preset": options.preset,
        "loop": main_loop,
        "images_per_second": images_per_second,
        "flop_per_image": flop,
        "share_of_peak": images_per_second * flop / peak,
        "peak_flop_per_second": peak,
        "batch_size": config.batch_size,
        "width": config.model.width,
        "precision": options.precision,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }
    if options.rounds and not options.reference:
        ratios = [a / b for a, b in zip(found["ours"], found["textbook"], strict=True)]
        report["textbook_images_per_second"] = statistics.median(found["textbook"])
        report["ratio"] = statistics.median(ratios)
        report["ratio_range"] = [min(ratios), max(ratios)]
        print(f"ours / textbook: {report['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(json.dumps(report))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
