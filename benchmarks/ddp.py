"""What data-parallel training costs: Ray Train beside torchrun, two workers beside one.

    python benchmarks/ddp.py digits --rounds 7

Three runs take turns, each the same loop (``pipelines.train.work``) on the same data in the same
order: two workers of one thread under Ray Train as ``train.py`` starts them, MLflow and all; two
processes of one thread under torchrun; and one worker of two threads under Ray Train. Compared is
the steady rate, after the first lap; what a start takes is for ``startup.py`` to say. The last line
is one JSON object.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import configured, device_name, in_turns, ratio

from ivegan.config import PRESETS, preset
from pipelines import train


def plan_of(options: argparse.Namespace, workers: int, threads: int) -> train.Plan:
    """Return the plan of one run, below the benchmark's own folder."""
    config = configured(options, total_images=options.images)
    run = train.Run(
        data=options.data,
        workers=workers,
        threads=threads,
        precision=options.precision,
        run_id=f"{workers}x{threads}-{uuid.uuid4().hex[:8]}",
        log_every=preset(options.preset).total_images // 100,  # as often as in a whole run
        save_every=options.images,
    )
    return train.resolve(options.preset, config, run)


def by_ray(options: argparse.Namespace, workers: int, threads: int) -> float:
    """Return the steady rate of ``train.py``, a process and a Ray of its own as for anybody."""
    plan = plan_of(options, workers, threads)
    words: dict[str, Any] = {
        "batch_size": plan.config.batch_size,
        "model.width": plan.config.model.width,
        "total-images": options.images,
        "precision": options.precision,
        "workers": workers,
        "threads": threads,
        "log-every": plan.run.log_every,
        "save-every": plan.run.save_every,
        "run-id": plan.run_id,
    } | ({"data": options.data} if options.data else {})
    given = [part for name, value in words.items() for part in (f"--{name}", str(value))]
    return rate_of([sys.executable, train.__file__, options.preset, "--json", *given])


def by_torchrun(options: argparse.Namespace) -> float:
    """Return the steady rate of two processes under torchrun."""
    here = [word for word in sys.argv[1:] if word != "--rank"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return rate_of([*command, str(Path(__file__).resolve()), *here, "--rank"], **threads)


def rate_of(command: list[str], **variables: str) -> float:
    """Return the rate in the outcome that a command prints as its last line."""
    told = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )
    return json.loads(told.stdout.splitlines()[-1])["images_per_second"]


def rank(options: argparse.Namespace) -> None:
    """Be one of torchrun's two processes."""
    dist.init_process_group("gloo")
    plan = plan_of(options, 2, 1)
    plan = train.at(plan, plan.config, f"torchrun-{os.environ['TORCHELASTIC_RUN_ID']}")
    outcome = train.work(plan, {}, lambda event: None)
    if dist.get_rank() == 0:
        print(json.dumps(outcome), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Print a line per round and one JSON object."""
    parser = argparse.ArgumentParser(description="Time data-parallel training")
    parser.add_argument("preset", choices=PRESETS, nargs="?", default="digits")
    parser.add_argument("--data", help="shards; digits builds its own")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--model.width", dest="width", type=float)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--images", type=int, default=20_000, help="of each run")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(options)
        return
    logging.disable(logging.WARNING)
    if options.data is not None:
        options.data = str(Path(options.data).resolve())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        train.check_data(plan_of(options, 2, 1))  # builds digits
        report = measure(options)
        os.chdir("/")
    print(json.dumps(report), flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Let the runs take turns, and return the report."""
    runs = {
        "Ray, 2 workers": lambda: by_ray(options, 2, 1),
        "torchrun, 2 processes": lambda: by_torchrun(options),
        "Ray, 1 worker of 2 threads": lambda: by_ray(options, 1, 2),
    }
    found = in_turns(runs, options.rounds, "images/s")
    ours, *others = runs
    return {
        "preset": options.preset,
        "images": options.images,
        "rounds": options.rounds,
        "precision": options.precision,
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "images_per_second": {name: statistics.median(v) for name, v in found.items()},
        "two_workers_to": {other: ratio(found[ours], found[other]) for other in others},
    }


if __name__ == "__main__":
    main()
