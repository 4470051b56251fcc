"""Compare the loader's rate with the step's.

    python benchmarks/loader.py mnist --data runs/data/mnist --precision bfloat16
    python benchmarks/loader.py celeba --model.width 0.25 --batch-size 16

The loader alone and the step alone on a batch in memory take turns. Without --data, random images
are read from a memory-mapped file, as a node's cache is; with it, the stream is timed too. The last
line is one JSON object.
"""

import contextlib
import functools
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, configured, in_turns, metadata, random_samples, rate, ratio
from torch import Tensor

from ivegan.config import PRESETS, Config
from ivegan.data.batches import batches
from ivegan.data.cache import Split, load_split
from ivegan.data.manifest import read_split_manifest
from ivegan.data.stream import Stream
from ivegan.order import Draws
from ivegan.step import State, create_state, train_step


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
        x, draws = next(batches(config, split, 0, 0, 1, device))
        loops: dict[str, Iterator] = {"loader": batches(config, split, 0, 0, 1, device)}
        loops["step"] = trained(state, x, draws)
        if options.data is not None:
            manifest = read_split_manifest(options.data, "train")
            stream = Stream(data_uri=options.data, manifest=manifest, split="train")
            loops["stream"] = batches(config, stream, 0, 0, 1, device)
        for running in loops.values():
            stack.callback(running.close)  # pyright: ignore[reportAttributeAccessIssue]
        settings = config.batch_size, options.seconds, options.device
        turns = {name: functools.partial(steady, one, *settings) for name, one in loops.items()}
        values = in_turns(turns, options.rounds, "")
    report = {
        **metadata(options, config),
        "images_per_second": {k: statistics.median(values[k]) for k in loops},
        "loader_to_step": ratio(values["loader"], values["step"]),
    }
    print(json.dumps(report), flush=True)


def cached(config: Config, data: str | None, folder: Path) -> Split:
    """Return a split whose images are a memory-mapped file."""
    if data is not None:
        return load_split(data, "train", folder)
    images = random_samples(config, 16_384 if config.dataset != "celeba" else 2_048)
    np.save(folder / "images.npy", images)
    images = np.load(folder / "images.npy", mmap_mode="r")
    labels = np.zeros(len(images), np.int64)
    return Split(images=images, labels=labels, keys=[], dataset_hash="")


def steady(loop: Iterator, *settings: Any) -> float:
    """Return a loop's rate, without the batches that were prepared during the others' turns."""
    next(loop)
    return rate(loop, *settings)


def trained(state: State, x: Tensor, draws: Draws) -> Iterator[int]:
    """Train on one batch over and over."""
    while True:
        train_step(state, x, draws)
        yield state.step


if __name__ == "__main__":
    main()
