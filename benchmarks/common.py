"""What the benchmarks share: their settings, their turns, their ratios, and the machine's name."""

import argparse
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ivegan.config import PRESETS, Config, override, preset


def arguments(description: str, presets: Iterable[str] = PRESETS) -> argparse.ArgumentParser:
    """Return a parser of the settings that every benchmark of a step has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("preset", choices=presets)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--model.width", dest="width", type=float)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    return parser


def configured(options: argparse.Namespace, **more: int) -> Config:
    """Return the preset with the batch size and width of the command line, and with more."""
    changes = {"batch_size": options.batch_size, "model.width": options.width, **more}
    return override(preset(options.preset), {k: v for k, v in changes.items() if v is not None})


def facts(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Return what a report says of how its figures were measured."""
    return {
        "preset": options.preset,
        "width": config.model.width,
        "batch_size": config.batch_size,
        "precision": options.precision,
        "device": device_name(options.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def in_turns(
    cases: dict[str, Callable[[], float]], rounds: int, unit: str
) -> dict[str, list[float]]:
    """Return what every case measures, round after round, each round in the other direction.

    Args:
        cases: what to call, by name.
        rounds: how often.
        unit: of what they return, for the line that each round prints.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in cases if number % 2 == 0 else reversed(cases):
            found[name].append(cases[name]())
        print("  ".join(f"{k} {shown(v[-1])} {unit}" for k, v in found.items()), flush=True)
    return found


def shown(value: float) -> str:
    """Return a measurement as people read it, to about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: list[float]) -> dict[str, float | list[float]]:
    """Return the median of some ratios, and the least and the largest."""
    return {"ratio": statistics.median(values), "range": [min(values), max(values)]}


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float | list[float]]:
    """Return the spread of what we measured over what they did, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def device_name(device: str) -> str:
    """Return the name of the GPU, or of the CPU and how many of its cores there are."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = Path("/proc/cpuinfo")
    names = found.read_text().splitlines() if found.exists() else []
    name = next((n.partition(": ")[2] for n in names if n.startswith("model name")), "")
    return f"{cores} cores, {name or platform.machine()}"
