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
from collections.abc import Iterator

import numpy as np
import torch
from common import arguments, configured, in_turns, metadata, random_samples, rate, ratio
from flop import peak_rate, step_flop
from textbook import steps as textbook_steps

from ivegan.config import Config
from ivegan.data.batches import batches
from ivegan.data.cache import Split
from ivegan.layers.fast import keep_freed_memory
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
