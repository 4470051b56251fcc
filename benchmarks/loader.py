"""Whether batches come faster than the step takes them: the cache's rate, and the step's wait.

    python benchmarks/loader.py mnist --data runs/data/mnist --precision bfloat16
    python benchmarks/loader.py celeba --model.width 0.25 --batch-size 16

The loader alone, the step alone on a batch in memory, and both together take turns; of both
together, the share of time is measured in which the step waits for its next batch. Without --data,
random images are read, from a file that is mapped into memory as a node's cache is. The last line
is one JSON object.
"""

import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import arguments, configured, facts, in_turns, ratio, spread
from flop import wait
from step import rate, samples_of

from ivegan.config import PRESETS, Config
from ivegan.data.batches import Split, batches, load_split
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
    images = [name for name, config in PRESETS.items() if not config.is_points]
    parser = arguments("Time the loader beside the step", images)
    parser.add_argument("--data", help="shards; random images without it")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config = configured(options)
    device = torch.device(options.device)
    state = create_state(config, device, getattr(torch, options.precision))
    with tempfile.TemporaryDirectory() as folder:
        split = cached(config, options.data, Path(folder))
        loops = {
            "loader": loader(config, split, device),
            "step": step(config, split, state),
        }
        together = batches(config, split, 0, 0, 1, device)
        turns = {
            name: functools.partial(
                steady, loop, config.batch_size, options.seconds, options.device
            )
            for name, loop in loops.items()
        }
        turns["waiting"] = functools.partial(waiting, together, state, options.seconds)
        found = in_turns(turns, options.rounds, "")
        together.close()  # pyright: ignore[reportAttributeAccessIssue]
        loops["loader"].close()  # pyright: ignore[reportAttributeAccessIssue]
    report = {
        **facts(options, config),
        "images_per_second": {k: statistics.median(found[k]) for k in loops},
        "loader_to_step": ratio(found["loader"], found["step"]),
        "waiting": spread(found["waiting"]),
    }
    print(json.dumps(report), flush=True)


def steady(loop: Iterator[int], batch_size: int, seconds: float, device: str) -> float:
    """Return a loop's rate, without what it made ready while others had their turn."""
    next(loop)
    return rate(loop, batch_size, seconds, device)


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
