"""Predict the rate of a run on 1 to 256 GPUs.

    python benchmarks/scaling.py --rate 2070 --share 64 --network 12.5e9

A step is the time to compute a rank's share, and the time to add the gradients of all ranks, which
nothing hides here: DDP overlaps part of it with the backward pass, so predictions are low. The
slowest of computing, exchanging, reading and decoding is the bottleneck. The last line is one JSON
object.
"""

import json
from dataclasses import dataclass

import tyro

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
    image: float = 49_280.0
    """Bytes of one image in its shard, 128x128."""
    store: float = 1e9
    """Bytes per second from the object store to one machine; infinite where images are cached."""
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
        }
        step = max(times["computing"] + times["exchange"], times["reading"])
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


if __name__ == "__main__":
    print(json.dumps(table(tyro.cli(Job))))
