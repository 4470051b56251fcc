"""Predict the rate of a run on 1 to 256 GPUs, or compare the prediction with two ranks on a CPU.

    python benchmarks/scaling.py table --rate 2070 --share 64 --network 12.5e9
    python benchmarks/scaling.py measure mnist --model.width 0.25 --batch-size 64

A step is the time to compute a rank's share, and the time to add the gradients of all ranks, which
nothing hides here: DDP overlaps part of it with the backward pass, so predictions are low. The
slowest of computing, exchanging, reading and decoding is the bottleneck. The last line is one JSON
object.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from common import configured, metadata, random_samples
from torch.multiprocessing.spawn import spawn

from ivegan.config import PRESETS, Config
from ivegan.data.batches import batches
from ivegan.data.cache import Split
from ivegan.layers.fast import keep_freed_memory
from ivegan.networks import Discriminators, EncoderGenerator
from ivegan.step import create_state, distribute, train_step

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a run costs; times in seconds, sizes in bytes, of one rank unless stated."""

    rate: float
    """Images per second of one GPU."""
    share: int
    """Images of a step."""
    gradient: float = 4 * 32.5e6
    """Of both sides' gradients, float32; celeba has 32.5 million parameters."""
    link: float = 150e9
    """Bytes per second between the GPUs of one machine."""
    network: float = 12.5e9
    """Bytes per second between machines, of each; 12.5e9 is 100 Gbit/s."""
    per_machine: int = 8
    """GPUs of one machine."""
    latency: float = 30e-6
    """Of one message."""
    image: float = 27e3
    """One image in its shard; 128x128 PNG."""
    store: float = 1e9
    """Bytes per second from the object store to one machine; infinite where images are cached."""
    decode: float = 1800.0
    """Images per second that one core decodes."""
    cores: int = 12
    """CPU cores per GPU."""

    def exchange(self, gpus: int) -> float:
        """Return the time to add the gradients of all ranks in a ring."""
        if gpus == 1:
            return 0.0
        machines = -(-gpus // self.per_machine)
        speed = self.link if machines == 1 else self.network
        return 2 * (gpus - 1) / gpus * self.gradient / speed + 4 * (gpus - 1) * self.latency

    def predict(self, gpus: int) -> dict[str, float | str]:
        """Return the rate, its share of the ideal one, and what limits it."""
        times = {
            "computing": self.share / self.rate,
            "exchange": self.exchange(gpus),
            "reading": self.share * min(gpus, self.per_machine) * self.image / self.store,
            "decoding": self.share / (self.decode * self.cores),
        }
        inputs = max(times["reading"], times["decoding"])
        step = max(times["computing"] + times["exchange"], inputs)
        return {
            "gpus": gpus,
            "batch": gpus * self.share,
            "images_per_second": gpus * self.share / step,
            "efficiency": self.share / self.rate / step,
            "bottleneck": max(times, key=times.__getitem__),
        }


def table(job: Job, images: float) -> list[dict[str, float | str]]:
    """Print the prediction for all numbers of GPUs, and return it."""
    rows = [job.predict(gpus) for gpus in GPUS]
    print(f"{'GPUs':>5} {'batch':>7} {'images/s':>10} {'of ideal':>9} {'hours':>7}  bottleneck")
    for row in rows:
        speed = float(row["images_per_second"])
        print(
            f"{row['gpus']:>5} {row['batch']:>7,} {speed:>10,.0f} {row['efficiency']:>9.0%} "
            f"{images / speed / 3600:>7.2f}  {row['bottleneck']}"
        )
    return rows


def steps(config: Config, samples: np.ndarray, rank: int, world: int) -> Iterator[float]:
    """Train on a rank and yield the seconds of each step."""
    state = create_state(config, "cpu", torch.float32)
    if world > 1:
        distribute(state)
    labels = np.zeros(len(samples), np.int64)
    split = Split(images=samples, labels=labels, keys=[], dataset_hash="")
    for x, draws in batches(config, split, 0, rank, world, state.device):
        start = time.perf_counter()
        train_step(state, x, draws)
        yield time.perf_counter() - start


def gradients(config: Config) -> int:
    """Return the bytes that a step exchanges."""
    networks = (EncoderGenerator(config.model), Discriminators(config.model))
    return sum(4 * p.numel() for network in networks for p in network.parameters())


def exchanges(size: int) -> Iterator[float]:
    """Add vectors of so many bytes of all ranks, and yield the seconds of each addition."""
    vector = torch.zeros(size // 4)
    while True:
        start = time.perf_counter()
        dist.all_reduce(vector)
        yield time.perf_counter() - start


def _rank(rank: int, store: str, options: argparse.Namespace, results: Any) -> None:
    """Measure, on one of two ranks: alone on its share, adding gradients, and training together."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    config = configured(options)
    half = dataclasses.replace(config, batch_size=config.batch_size // 2)
    samples = random_samples(config, 2048)
    cases = {
        "alone": steps(half, samples, 0, 1),
        "exchange": exchanges(gradients(config)),
        "together": steps(config, samples, rank, 2),
    }
    for _ in range(options.rounds):
        for name, case in cases.items():
            dist.barrier()  # both compute at a time: they share the caches and the memory
            times = [next(case) for _ in range(options.steps + 2)][2:]
            if rank == 0:
                results.put((name, statistics.median(times)))
    dist.barrier()
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, object]:
    """Compare the prediction for two ranks with two ranks, round by round."""
    results = multiprocessing.get_context("spawn").Queue()
    store = f"file://{tempfile.mkdtemp()}/store"
    ranks = spawn(_rank, (store, options, results), nprocs=2, join=False)
    ratios, times = [], {}
    for number in range(3 * options.rounds):
        name, seconds = results.get(timeout=600)
        times[name] = seconds
        if number % 3 == 2:
            predicted = times["alone"] + times["exchange"]
            ratios.append(predicted / times["together"])
            print("  ".join(f"{k} {v * 1000:,.1f} ms" for k, v in times.items()), end="")
            print(f"  predicted {predicted * 1000:,.1f} ms", flush=True)
    assert ranks is not None
    ranks.join()
    config = configured(options)
    return {
        **metadata(options, config),
        "gradient_bytes": gradients(config),
        "predicted_by_measured": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }


def main() -> None:
    """Print a table or the rounds, and one JSON object."""
    parser = argparse.ArgumentParser(description="Predict the rate of a run on many GPUs")
    verbs = parser.add_subparsers(dest="verb", required=True)
    predicted = verbs.add_parser("table", help="the prediction for 1 to 256 GPUs")
    for field in dataclasses.fields(Job):
        default = None if field.default is dataclasses.MISSING else field.default
        kind = int if field.type in (int, "int") else float
        flag = f"--{field.name.replace('_', '-')}"
        predicted.add_argument(flag, type=kind, default=default, required=default is None)
    predicted.add_argument("--images", type=float, default=2.6e6, help="of the whole run")
    compared = verbs.add_parser("measure", help="two ranks on this CPU")
    compared.add_argument("preset", choices=list(PRESETS))
    compared.add_argument("--batch-size", type=int)
    compared.add_argument("--model.width", dest="width", type=float)
    compared.add_argument("--steps", type=int, default=10, help="of each measurement")
    compared.add_argument("--rounds", type=int, default=5)
    compared.set_defaults(device="cpu", precision="float32")
    options = parser.parse_args()
    if options.verb == "measure":
        print(json.dumps(measure(options)))
        return
    names = [field.name for field in dataclasses.fields(Job)]
    job = Job(**{name: getattr(options, name) for name in names})
    print(json.dumps(table(job, options.images)))


if __name__ == "__main__":
    main()
