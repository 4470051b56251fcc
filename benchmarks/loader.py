"""Compare the loader's rate with the step's, and measure the step's wait for input.

    python benchmarks/loader.py mnist --data runs/data/mnist --precision bfloat16
    python benchmarks/loader.py celeba --model.width 0.25 --batch-size 16

The loader alone, the step alone on a batch in memory, and both together take turns; of the last,
the share of time is measured in which the step waits for its next batch. Without --data, random
images are read from a memory-mapped file, as a node's cache is; with it, the stream is timed too.
The last line is one JSON object.
"""

import contextlib
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
from common import (
    arguments,
    configured,
    in_turns,
    metadata,
    random_samples,
    rate,
    ratio,
    spread,
    wait,
)

from ivegan.config import PRESETS, Config
from ivegan.data.batches import batches
from ivegan.data.cache import Split, load_split
from ivegan.data.manifest import read_split_manifest
from ivegan.data.stream import Stream
from ivegan.step import State, create_state, train_step


def cached(config: Config, data: str | None, folder: Path) -> Split:
    """Return a split whose images are a memory-mapped file."""
    if data is not None:
        return load_split(data, "train", folder)
    images = random_samples(config, 16_384 if config.dataset != "celeba" else 2_048)
    np.save(folder / "images.npy", images)
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.zeros(len(images), np.int64)
    return Split(images=images, labels=labels, keys=[], dataset_hash="")


def main() -> None:
    """Print a line per round and one JSON object."""
    presets = [name for name, config in PRESETS.items() if not config.is_points]
    parser = arguments("Time the loader beside the step", presets)
    parser.add_argument("--data", help="shards; random images without it")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config, device = configured(options), torch.device(options.device)
    state = create_state(config, device, getattr(torch, options.precision))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        split = cached(config, options.data, Path(folder))
        loops = {"loader": loader(config, split, device), "step": step(config, split, state)}
        together = batches(config, split, 0, 0, 1, device)
        if options.data is not None:
            manifest = read_split_manifest(options.data, "train")
            stream = Stream(data_uri=options.data, manifest=manifest, split="train")
            loops["stream"] = loader(config, stream, device)
        for running in (together, *loops.values()):
            stack.callback(running.close)  # pyright: ignore[reportAttributeAccessIssue]
        turns = {
            name: functools.partial(
                steady, loop, config.batch_size, options.seconds, options.device
            )
            for name, loop in loops.items()
        }
        turns["waiting"] = functools.partial(waiting, together, state, options.seconds)
        values = in_turns(turns, options.rounds, "")
    report = {
        **metadata(options, config),
        "images_per_second": {k: statistics.median(values[k]) for k in loops},
        "loader_to_step": ratio(values["loader"], values["step"]),
        "waiting": spread(values["waiting"]),
    }
    print(json.dumps(report), flush=True)


def steady(loop: Iterator[int], batch_size: int, seconds: float, device: str) -> float:
    """Return a loop's rate, without the batches that were prepared during the others' turns."""
    next(loop)
    return rate(loop, batch_size, seconds, device)


def loader(config: Config, source: Split | Stream, device: torch.device) -> Iterator[int]:
    """Take one batch after the other, as floats on the device, with the draws of its step."""
    for number, _ in enumerate(batches(config, source, 0, 0, 1, device)):
        yield number


def step(config: Config, split: Split, state: State) -> Iterator[int]:
    """Train on one batch in memory, over and over."""
    ready = batches(config, split, 0, 0, 1, state.device)
    x, draws = next(ready)
    ready.close()  # pyright: ignore[reportAttributeAccessIssue]
    while True:
        train_step(state, x, draws)
        yield state.step


def waiting(together: Iterator, state: State, seconds: float) -> float:
    """Return the share of a loop's time that it waits for batches, over some seconds."""
    for x, draws in itertools.islice(together, 2):  # batches prepared in between
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
