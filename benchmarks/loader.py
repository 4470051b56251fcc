"""Whether batches come faster than the step takes them: the cache's rate, and the step's wait.

    python benchmarks/loader.py mnist --data runs/data/mnist --precision bfloat16
    python benchmarks/loader.py celeba --model.width 0.25 --batch-size 16

The loader alone, the step alone on a batch in memory, and both together take turns; of both
together, the share of time is measured in which the step waits for its next batch. Without --data,
random images are read, from a file that is mapped into memory as a node's cache is. The last line
is one JSON object.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from flop import wait
from step import processor, rate, samples_of

from ivegan.config import PRESETS, Config, override, preset
from ivegan.data import Split, batches, load_split
from ivegan.step import State, create_state, train_step


def cached(config: Config, data: str | None, folder: Path) -> Split:
    """Return a split whose images are a memory-mapped file."""
    if data is not None:
        return load_split(data, "train", folder)
    images = samples_of(config, 16_384 if config.dataset != "celeba" else 2_048)
    np.save(folder / "images.npy", images)
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.zeros(len(images), np.int64)
    return Split(images=images, labels=labels, keys=[], dataset_hash="")


def main() -> None:
    """Print a line per round and one JSON object."""
    parser = argparse.ArgumentParser(description="Time the loader beside the step")
    parser.add_argument("preset", choices=[k for k, v in PRESETS.items() if not v.is_points])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", help="shards; random images without it")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--model.width", dest="width", type=float)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    changes = {"batch_size": options.batch_size, "model.width": options.width}
    config = override(preset(options.preset), {k: v for k, v in changes.items() if v is not None})
    device = torch.device(options.device)
    state = create_state(config, device, getattr(torch, options.precision))
    with tempfile.TemporaryDirectory() as folder:
        split = cached(config, options.data, Path(folder))
        loops = {
            "loader": loader(config, split, device),
            "step": step(config, split, state),
        }
        together = batches(config, split, 0, 0, 1, device)
        found: dict[str, list[float]] = {"loader": [], "step": [], "waiting": []}
        for number in range(options.rounds):
            for name in loops if number % 2 == 0 else reversed(loops):
                next(loops[name])
                found[name].append(
                    rate(loops[name], config.batch_size, options.seconds, options.device)
                )
            found["waiting"].append(waiting(together, state, options.seconds))
            print(
                f"loader {found['loader'][-1]:,.0f} images/s  step {found['step'][-1]:,.0f} "
                f"images/s  waiting {found['waiting'][-1]:.2%} of the step",
                flush=True,
            )
        together.close()  # pyright: ignore[reportAttributeAccessIssue]
        loops["loader"].close()  # pyright: ignore[reportAttributeAccessIssue]
    ratios = [a / b for a, b in zip(found["loader"], found["step"], strict=True)]
    report = {
        "preset": options.preset,
        "width": config.model.width,
        "batch_size": config.batch_size,
        "precision": options.precision,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images_per_second": {k: statistics.median(found[k]) for k in ("loader", "step")},
        "loader_to_step": {
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        },
        "waiting": {
            "ratio": statistics.median(found["waiting"]),
            "range": [min(found["waiting"]), max(found["waiting"])],
        },
    }
    print(json.dumps(report), flush=True)


def loader(config: Config, split: Split, device: torch.device) -> Iterator[int]:
    """Take one batch after the other, as floats on the device, with the draws of its step."""
    for number, _ in enumerate(batches(config, split, 0, 0, 1, device)):
        yield number


def step(config: Config, split: Split, state: State) -> Iterator[int]:
    """Train on one batch that is there, over and over."""
    ready = batches(config, split, 0, 0, 1, state.device)
    x, draws = next(ready)
    ready.close()  # pyright: ignore[reportAttributeAccessIssue]
    while True:
        train_step(state, x, draws)
        yield state.step


def waiting(together: Iterator, state: State, seconds: float) -> float:
    """Return the share of a loop's time that it waits for batches, over some seconds."""
    for x, draws in itertools.islice(together, 2):  # what was read ahead meanwhile
        train_step(state, x, draws)
    waited, device = 0.0, state.device.type
    wait(device)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        before = time.perf_counter()
        x, draws = next(together)
        waited += time.perf_counter() - before
        train_step(state, x, draws)
        wait(device)
    return waited / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
