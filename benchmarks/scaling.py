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
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import tyro
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
    """Predict the rate of a run; times in seconds, sizes in bytes, of one rank unless stated."""

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
    images: float = 2.6e6
    """Of the whole run."""

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


def table(job: Job) -> list[dict[str, float | str]]:
    """Print the prediction for all numbers of GPUs, and return it."""
    rows = [job.predict(gpus) for gpus in GPUS]
    print(f"{'GPUs':>5} {'batch':>7} {'images/s':>10} {'of ideal':>9} {'hours':>7}  bottleneck")
    for row in rows:
        speed = float(row["images_per_second"])
        print(
            f"{row['gpus']:>5} {row['batch']:>7,} {speed:>10,.0f} {row['efficiency']:>9.0%} "
            f"{job.images / speed / 3600:>7.2f}  {row['bottleneck']}"
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


def measure(rank: int, store: str, options: argparse.Namespace) -> None:
    """Compare the prediction with two ranks: alone, adding gradients, and training together."""
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
    ratios = []
    for _ in range(options.rounds):
        times = {}
        for name, case in cases.items():
            dist.barrier()  # both compute at a time: they share the caches and the memory
            times[name] = statistics.median([next(case) for _ in range(options.steps + 2)][2:])
        times["predicted"] = times["alone"] + times["exchange"]
        ratios.append(times["predicted"] / times["together"])
        if rank == 0:
            print("  ".join(f"{k} {v * 1000:,.1f} ms" for k, v in times.items()), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        report = metadata(options, config) | {"gradient_bytes": gradients(config)}
        report |= {"predicted_by_measured": statistics.median(ratios)}
        print(json.dumps(report | {"range": [min(ratios), max(ratios)]}), flush=True)


def main() -> None:
    """Print a table or the rounds, and one JSON object."""
    verb, *words = sys.argv[1:] or ["--help"]
    if verb == "table":
        print(json.dumps(table(tyro.cli(Job, args=words))))
        return
    parser = argparse.ArgumentParser(usage="scaling.py table --help | measure PRESET [OPTIONS]")
    parser.add_argument("verb", choices=("table", "measure"))
    parser.add_argument("preset", choices=list(PRESETS))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--model.width", dest="width", type=float)
    parser.add_argument("--steps", type=int, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.set_defaults(device="cpu", precision="float32")
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (f"file://{folder}/store", parser.parse_args()), nprocs=2)


if __name__ == "__main__":
    main()
