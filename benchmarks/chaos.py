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
import json
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "infra"))

import local_cluster  # noqa: E402
from local_cluster import Cluster, environment_of  # noqa: E402

PROCESSES = {"rank": "RayTrainWorker", "raylet": "raylet/raylet", "gcs": "gcs/gcs_server"}
VICTIMS = (*PROCESSES, "driver", "s3", "mlflow")
BATCH = 64
_PAUSE = 5.0, 40.0  # seconds between two faults
_DOWN = 0.0, 20.0  # seconds that a server is away
_HANGS = 900.0  # seconds without an end after which a training counts as hung


@dataclass
class Round:
    """What happened in one round."""

    number: int
    faults: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    """Faults after which the training ended before the next one, and was started again."""
    after_steps: int = 0
    """Faults before which steps had been computed since the last start."""
    restarts: int = 0
    problems: tuple[str, ...] = ()


class Trial:
    """A training in a process of its own, with its Ray."""

    def __init__(self, cluster: Cluster, run_id: str, seed: int, images: int) -> None:
        self.run_id = run_id
        bucket = f"s3://{local_cluster.BUCKET}"
        self._words = [sys.executable, str(ROOT / "pipelines/train.py"), "digits"]
        self._words += ["--run-id", run_id, "--seed", str(seed), "--total-images", str(images)]
        self._words += ["--batch-size", str(BATCH), "--model.width", "0.25", "--keep", "0"]
        self._words += ["--data", f"{bucket}/digits", "--storage", f"{bucket}/runs"]
        self._words += ["--workers", "2", "--resume"]
        self._folder = Path(cluster.folder)
        self.log = self._folder / f"{run_id}.log"
        self._environment = environment_of(cluster)
        for name in [n for n in self._environment if n.startswith("RAY_")]:
            del self._environment[name]  # a Ray of its own
        self._environment["RAY_worker_niceness"] = "0"  # at 15, ranks starve on a busy machine
        self.start()

    def start(self) -> None:
        """Start it, or continue it."""
        self._start = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._words, cwd=self._folder, env=self._environment, stdout=log, stderr=log
            )

    def has_trained(self) -> bool:
        """Return whether steps have been computed since the last start."""
        return b"\nimages " in self.log.read_bytes()[self._start :]

    def kill(self, victim: str, draws: random.Random) -> bool:
        """Kill one of its processes; return whether there was one."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return False
        if victim == "driver":
            self.process.kill()
            return True
        found = [p for p in family if PROCESSES[victim] in _command(p)]
        if found:
            draws.choice(found).kill()
        return bool(found)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def broken(trial: Trial, cluster: Cluster, draws: random.Random, deadline: float) -> Round:
    """Kill processes until the training ends with 0, starting it again where it ended otherwise."""
    outcome = Round(int(trial.run_id.rpartition("-")[2]))
    away: dict[str, float] = {}  # server -> when it comes back
    victims: list[str] = []
    last = ""  # the fault since which the training has not been started again
    last_restart, spared = time.monotonic(), True
    while True:
        wait = draws.uniform(*_PAUSE)
        try:
            status = trial.process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            status = None
        for server in [s for s, when in away.items() if when < time.monotonic()]:
            del away[server]
            _start(cluster, server)
        if status == 0:
            break
        if status is not None:
            trial.start()
            outcome.restarts += 1
            outcome.endings.update([last] if last else [])
            last = ""
            last_restart, spared = time.monotonic(), draws.random() < 0.5
            continue
        if time.monotonic() - last_restart > _HANGS:
            outcome.problems += ("a training hangs",)
            trial.process.kill()
            break
        if time.monotonic() > deadline:
            continue  # it ends in peace
        trained = trial.has_trained()
        if spared and not trained:
            continue
        if not victims:
            victims = draws.sample(VICTIMS, len(VICTIMS))
        for victim in victims:  # the first that is there
            if victim in ("s3", "mlflow") and victim not in away:
                local_cluster.end(cluster, victim, kill=True)
                away[victim] = time.monotonic() + draws.uniform(*_DOWN)
            elif victim in away or not trial.kill(victim, draws):
                continue
            victims.remove(victim)
            outcome.faults[victim] += 1
            outcome.after_steps += trained
            last = victim
            print(f"{trial.run_id}: {victim} killed", flush=True)
            break
    for server in away:
        _start(cluster, server)
    return outcome


def _start(cluster: Cluster, server: str) -> None:
    start = {"s3": local_cluster.start_s3, "mlflow": local_cluster.start_mlflow}
    start[server](cluster)


def result(cluster: Cluster, run_id: str) -> tuple[bytes, dict[Any, Any], dict[Any, int]]:
    """Return a run's last weights, its history, and how often MLflow has each point.

    Rates and the load of the machine are left out: they differ from run to run.
    """
    code = (
        "import sys, json, hashlib; from ivegan import checkpoint, storage; from pipelines import "
        "record; uri = sys.argv[1]; last = checkpoint.find(uri); weights = storage.read_bytes("
        "f'{last}/weights.safetensors'); print(json.dumps([hashlib.sha256(weights).hexdigest(), ["
        "[p.images_seen, p.metrics] for p in record.read_metrics(uri)]]))"
    )
    found = json.loads(_ask(cluster, code, f"s3://{local_cluster.BUCKET}/runs/{run_id}"))
    history = {
        (images, name): value
        for images, metrics in found[1]
        for name, value in metrics.items()
        if not name.startswith(("rate/", "system/"))
    }
    code = (
        "import sys, json, mlflow; c = mlflow.MlflowClient(); (e,) = [e.experiment_id for e in "
        "c.search_experiments() if e.name == 'ivegan-digits']; (r,) = [r for r in c.search_runs("
        "[e]) if r.info.run_name == sys.argv[1]]; print(json.dumps([[m.step, n] for n in r.data."
        "metrics for m in c.get_metric_history(r.info.run_id, n)]))"
    )
    points = Counter(tuple(point) for point in json.loads(_ask(cluster, code, run_id)))
    return found[0], history, {k: n for k, n in points.items() if k in history}


def _ask(cluster: Cluster, code: str, argument: str) -> str:
    words = [sys.executable, "-c", code, argument]
    environment = environment_of(cluster) | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        words, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()[-1]


def compare(cluster: Cluster, reference: str, run_id: str) -> tuple[str, ...]:
    """Return how a run differs from the unbroken one."""
    words = [sys.executable, str(ROOT / "pipelines/registry.py"), "sync"]
    words += ["--storage", f"s3://{local_cluster.BUCKET}/runs"]
    subprocess.run(words, env=environment_of(cluster), check=True, stdout=subprocess.DEVNULL)
    weights, history, _ = result(cluster, reference)
    other_weights, other_history, points = result(cluster, run_id)
    problems = []
    if other_weights != weights:
        problems.append("other weights")
    if other_history != history:
        differing = set(history.items()) ^ set(other_history.items())
        problems.append(f"another history: {len(differing)} points, {sorted(differing)[:4]}")
    if points != dict.fromkeys(history, 1):
        wrong = {k: points.get(k, 0) for k in history if points.get(k, 0) != 1}
        problems.append(f"MLflow has points not once: {dict(list(wrong.items())[:4])}")
    return tuple(problems)


def main() -> None:
    """Run rounds until the time is over, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--images", type=int, default=40_000, help="length of each training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rounds: list[Round] = []
    with local_cluster.servers() as cluster:
        words = [sys.executable, str(ROOT / "data_prep/build.py"), "digits", "--workers", "0"]
        words += ["--out", f"s3://{local_cluster.BUCKET}/digits"]
        subprocess.run(words, env=environment_of(cluster), check=True, stdout=subprocess.DEVNULL)
        reference = Trial(cluster, "reference-0", options.seed, options.images)
        if reference.process.wait():
            raise SystemExit(f"The unbroken run failed: {reference.log.read_text()[-4000:]}")
        deadline = time.monotonic() + 60 * options.minutes
        while time.monotonic() < deadline:
            trial = Trial(cluster, f"broken-{len(rounds) + 1}", options.seed, options.images)
            draws = random.Random(f"{options.seed} {len(rounds)}")
            outcome = broken(trial, cluster, draws, deadline)
            outcome.problems += compare(cluster, reference.run_id, trial.run_id)
            if outcome.problems:
                print(trial.log.read_text())
            print(
                f"round {outcome.number}: {sum(outcome.faults.values())} faults "
                f"{dict(outcome.faults)}, {outcome.restarts} restarts: "
                f"{'; '.join(outcome.problems) or 'equal'}",
                flush=True,
            )
            rounds.append(outcome)
    print(summary(rounds))
    sys.exit(any(one.problems for one in rounds))


def summary(rounds: list[Round]) -> str:
    """Return a line for each victim, and one for all rounds."""
    lines = []
    for victim in (*VICTIMS, "all"):
        names = VICTIMS if victim == "all" else (victim,)
        numbers = [sum(one.faults[n] for n in names) for one in rounds]
        survived = sum(n for n, one in zip(numbers, rounds, strict=True) if not one.problems)
        endings = sum(one.endings[n] for one in rounds for n in names)
        lines.append(
            f"{victim}: {sum(numbers)} faults, {survived} survived, {endings} of them by --resume"
        )
    lines.append(f"after steps since the last start: {sum(one.after_steps for one in rounds)}")
    failed = [one.number for one in rounds if one.problems]
    equal = "weights and history of all equal the unbroken run's, each point once in MLflow"
    ending = f"rounds that differ: {failed}" if failed else equal
    return "\n".join([*lines, f"{len(rounds)} rounds: {ending}"])


if __name__ == "__main__":
    main()
