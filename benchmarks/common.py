"""Settings, alternating turns and ratios that the benchmarks share."""

import argparse
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ivegan import order
from ivegan.config import PRESETS, PROTOCOLS, Config, override, preset
from ivegan.networks import sample_shape


def arguments(description: str, presets: Iterable[str] = PRESETS) -> argparse.ArgumentParser:
    """Return a parser of the settings that every benchmark of a step has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("preset", choices=list(presets))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--model.width", dest="width", type=float)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    return parser


def configured(options: argparse.Namespace) -> Config:
    """Return the preset with the batch size and width of the command line."""
    changes = {"batch_size": options.batch_size, "model.width": options.width}
    return override(preset(options.preset), {k: v for k, v in changes.items() if v is not None})


def metadata(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Return the settings and the machine, for a benchmark's report."""
    return {
        "preset": options.preset,
        "width": config.model.width,
        "batch_size": config.batch_size,
        "precision": options.precision,
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def random_samples(config: Config, count: int = 4096) -> np.ndarray:
    """Return random images, uint8, or points: the time does not depend on their content."""
    random = np.random.default_rng(0)
    if config.is_points:
        means, std = order.modes(config.dataset, PROTOCOLS[config.protocol])
        chosen = means[random.integers(len(means), size=100_000)]
        return (chosen + std * random.standard_normal(chosen.shape)).astype(np.float32)
    return random.integers(0, 256, (count, *sample_shape(config.model)), dtype=np.uint8)


def wait(device: str) -> None:
    """Wait until the device has finished; on a CPU nothing is pending."""
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


def in_turns(
    cases: dict[str, Callable[[], float]], rounds: int, unit: str
) -> dict[str, list[float]]:
    """Return the measurements of every case, round by round, in alternating direction.

    Args:
        cases: functions to call, by name.
        rounds: number of rounds; each prints a line.
        unit: of the returned values.
    """
    values: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in cases if number % 2 == 0 else reversed(cases):
            values[name].append(cases[name]())
        print("  ".join(f"{k} {v[-1]:,.4g} {unit}" for k, v in values.items()), flush=True)
    return values


def spread(ratios: list[float]) -> dict[str, Any]:
    """Return the median of some ratios, the least and the largest."""
    return {"ratio": statistics.median(ratios), "range": [min(ratios), max(ratios)]}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Return the spread of our values divided by theirs, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def device_name(device: str) -> str:
    """Return the name of the GPU, or the CPU's name and number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    named = re.search("^model name.*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = named[1] if named else platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores, {name}"
