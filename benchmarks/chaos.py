"""Train while processes are killed at random, and compare with unbroken runs.

    python benchmarks/chaos.py --minutes 30

One configuration is trained again and again, with two workers of Ray, checkpoints in S3 and metrics
in MLflow, all real servers on loopback. Every time but the first a rank, Ray's raylet or GCS, the
driver, the S3 server or the MLflow server is killed every few seconds; servers start again after a
while, and a training that ended is started again with --resume. Half of the starts are left alone
until they have trained, so that a run advances. At the end weights and history must be equal to
those of the first, and MLflow must hold each point once.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
from mlflow import MlflowClient

from ivegan import checkpoint, storage
from pipelines import record

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "infra"))

import local_cluster  # noqa: E402
from local_cluster import Cluster  # noqa: E402

PROCESSES = {"rank": "RayTrainWorker", "raylet": "raylet/raylet", "gcs": "gcs/gcs_server"}
SERVERS = {"s3": local_cluster.start_s3, "mlflow": local_cluster.start_mlflow}
VICTIMS = (*PROCESSES, "driver", *SERVERS)
BUCKET = f"s3://{local_cluster.BUCKET}"
_PAUSE = 5.0, 40.0  # seconds between two faults
_DOWN = 0.0, 20.0  # seconds that a server is away
_HANGS = 900.0  # seconds without an end after which a training counts as hung


def run(script: str, *words: str) -> None:
    """Run a command of the project to its end."""
    command = [sys.executable, str(ROOT / script), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class Trial:
    """A training in a process of its own, with its Ray."""

    def __init__(self, cluster: Cluster, run_id: str, options: argparse.Namespace) -> None:
        self.run_id, self.uri = run_id, f"{BUCKET}/runs/{run_id}"
        self._words = [sys.executable, str(ROOT / "pipelines/train.py"), "digits"]
        self._words += ["--run-id", run_id, "--workers", "2", "--resume", "--keep", "0"]
        self._words += ["--seed", str(options.seed), "--total-images", str(options.images)]
        self._words += ["--batch-size", "64", "--model.width", "0.25"]
        self._words += ["--data", f"{BUCKET}/digits", "--storage", f"{BUCKET}/runs"]
        self.log = Path(cluster.folder) / f"{run_id}.log"
        self.start()

    def start(self) -> None:
        """Start it, or continue it."""
        self._start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._words, cwd=self.log.parent, stdout=log, stderr=log
            )

    def has_trained(self) -> bool:
        """Return whether steps have been computed since the last start."""
        return b"\nimages " in self.log.read_bytes()[self._start :]

    def kill(self, victim: str, draws: random.Random) -> bool:
        """Kill one of its processes; return whether there was one."""
        if victim == "driver":
            self.process.kill()
            return True
        with contextlib.suppress(psutil.Error):  # one of them ended meanwhile
            family = psutil.Process(self.process.pid).children(recursive=True)
            if found := [p for p in family if PROCESSES[victim] in " ".join(p.cmdline())]:
                draws.choice(found).kill()
                return True
        return False


def broken(
    trial: Trial, cluster: Cluster, draws: random.Random, deadline: float, faults: Counter[str]
) -> None:
    """Kill processes until the training ends with 0, starting it again where it ended otherwise.

    Counts restarts, faults by victim, and those after steps since the last start.
    """
    away: dict[str, float] = {}  # server -> when it comes back
    victims: list[str] = []
    last_start, spared, status = time.monotonic(), True, None
    while status != 0:
        try:
            status = trial.process.wait(timeout=draws.uniform(*_PAUSE))
        except subprocess.TimeoutExpired:
            status = None
        for server in [s for s, when in away.items() if status == 0 or when < time.monotonic()]:
            del away[server]
            SERVERS[server](cluster)
        if status is not None:
            if status:
                trial.start()
                faults["restarts"] += 1
                last_start, spared = time.monotonic(), draws.random() < 0.5
            continue
        if time.monotonic() - last_start > _HANGS:
            trial.process.kill()
            raise SystemExit(f"A training hangs: {trial.log.read_text()}")
        trained = trial.has_trained()
        if time.monotonic() > deadline or (spared and not trained):
            continue
        victims = victims or draws.sample(VICTIMS, len(VICTIMS))
        for victim in victims:  # the first that is there
            if victim in SERVERS and victim not in away:
                local_cluster.end(cluster, victim, kill=True)
                away[victim] = time.monotonic() + draws.uniform(*_DOWN)
            elif victim in away or not trial.kill(victim, draws):
                continue
            victims.remove(victim)
            faults[victim] += 1
            faults["after steps"] += trained
            print(f"{trial.run_id}: {victim} killed", flush=True)
            break


def history_of(trial: Trial) -> dict[tuple[int, str], float]:
    """Return a run's metrics, without rates and the load of the machine: they differ."""
    return {
        (point.images_seen, name): value
        for point in record.read_metrics(trial.uri)
        for name, value in point.metrics.items()
        if not name.startswith(("rate/", "system/"))
    }


def points_of(trial: Trial) -> Counter[tuple[int, str]]:
    """Return how often MLflow has each point of a run."""
    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'ivegan-digits'")
    named = f"attributes.run_name = '{trial.run_id}'"
    (found,) = client.search_runs([experiment.experiment_id], named)
    return Counter(
        (metric.step, name)
        for name in found.data.metrics
        for metric in client.get_metric_history(found.info.run_id, name)
    )


def compare(reference: Trial, trial: Trial) -> list[str]:
    """Return how a run differs from the unbroken one."""
    run("pipelines/registry.py", "sync", "--storage", f"{BUCKET}/runs")
    problems = []
    weights = [
        storage.read_bytes(f"{checkpoint.find(one.uri)}/weights.safetensors")
        for one in (reference, trial)
    ]
    if weights[0] != weights[1]:
        problems.append("other weights")
    wanted, history, points = history_of(reference), history_of(trial), points_of(trial)
    if history != wanted:
        differing = sorted(set(wanted.items()) ^ set(history.items()))
        problems.append(f"another history: {len(differing)} points, {differing[:4]}")
    if wrong := {point: points[point] for point in wanted if points[point] != 1}:
        problems.append(f"MLflow has points not once: {dict(list(wrong.items())[:4])}")
    return problems


def main() -> None:
    """Run rounds until the time is over, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--images", type=int, default=40_000, help="length of each training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rounds: list[list[str]] = []
    faults: Counter[str] = Counter()
    with local_cluster.servers() as cluster:
        environment = local_cluster.environment_of(cluster)
        os.environ.clear()
        os.environ.update({k: v for k, v in environment.items() if not k.startswith("RAY_")})
        os.environ |= {"RAY_worker_niceness": "0"}  # at 15, ranks starve on a busy machine
        run("data_prep/build.py", "digits", "--workers", "0", "--out", f"{BUCKET}/digits")
        reference = Trial(cluster, "reference-0", options)
        if reference.process.wait():
            raise SystemExit(f"The unbroken run failed: {reference.log.read_text()[-4000:]}")
        deadline = time.monotonic() + 60 * options.minutes
        while time.monotonic() < deadline:
            trial = Trial(cluster, f"broken-{len(rounds) + 1}", options)
            draws = random.Random(f"{options.seed} {len(rounds)}")
            broken(trial, cluster, draws, deadline, faults)
            rounds.append(compare(reference, trial))
            if rounds[-1]:
                print(trial.log.read_text())
            print(f"{trial.run_id}: {'; '.join(rounds[-1]) or 'equal'}; {dict(faults)}", flush=True)
    differing = [number for number, problems in enumerate(rounds, 1) if problems]
    equal = "weights and history of all equal the unbroken run's, each point once in MLflow"
    print(f"{len(rounds)} rounds: {f'rounds that differ: {differing}' if differing else equal}")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
