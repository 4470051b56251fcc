"""The MLflow server is killed under a training and under a sweep: nothing stops, is lost, or twice.

Everything is real: the commands, the server, its database, the object store under it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow_server import MlflowServer, postgres
from processes import kill

from ivegan import storage
from pipelines import record as records
from pipelines.tracking import mirror

ROOT = Path(__file__).resolve().parents[2]
BATCH = 64


@pytest.fixture
def server(
    request: pytest.FixtureRequest,
    home: Path,
    s3: str,
    empty_store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[MlflowServer]:
    """Return a running MLflow server, with artifacts in S3; commands that start now find it."""

    def run(store: str) -> Iterator[MlflowServer]:
        server = MlflowServer(home, store, f"{s3}/mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        server.start()
        yield server
        server.kill()

    if request.param == "postgresql":
        with postgres() as store:
            yield from run(store)
    else:
        shutil.copy(empty_store, home / "server.db")
        yield from run(f"sqlite:///{home}/server.db")


class Command:
    """A command of ours in a process of its own, whose lines are the clock of a test."""

    def __init__(self, home: Path, name: str, *words: str) -> None:
        self._log = home / f"{name}.err"
        with self._log.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "pipelines" / name), *words],
                cwd=home,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        self.lines: list[str] = []

    def until(self, enough: Callable[[str], bool]) -> bool:
        """Read lines to the first that is enough; False if the command ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if enough(line):
                return True
        return False

    def result(self) -> dict[str, Any]:
        """Return its JSON object, once it has ended well."""
        self.until(lambda line: False)
        assert self.process.wait() == 0, "".join(self.lines)[-2000:] + self._log.read_text()[-2000:]
        return json.loads(self.lines[-1])


@pytest.fixture
def command(home: Path) -> Iterator[Callable[..., Command]]:
    """Return a function that starts a command; what still runs at the end of the test is killed."""
    started: list[Command] = []

    def start(name: str, *words: str) -> Command:
        started.append(Command(home, name, *words))
        return started[-1]

    yield start
    for one in started:
        kill(one.process)
        if one.process.stdout is not None:
            one.process.stdout.close()


def check_delivered(uri: str, run: Run, run_uri: str) -> None:
    """Check that MLflow has every point and figure of a run's folder, and each of them once."""
    points: dict[str, list[tuple[int, float, int]]] = defaultdict(list)
    for point in records.read_metrics(run_uri):
        for name, value in point.metrics.items():
            points[name].append((point.images_seen, value, point.time))
    client = MlflowClient(uri)
    assert set(run.data.metrics) == set(points)
    for name, wanted in points.items():
        assert len({step for step, _, _ in wanted}) == len(wanted)
        got = [
            (p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, name)
        ]
        assert sorted(got) == sorted(wanted), name
    figures = {f"figures/{name}" for name in storage.list_names(f"{run_uri}/figures")}
    assert {f.path for f in client.list_artifacts(run.info.run_id, "figures")} == figures


@pytest.mark.parametrize("server", ["postgresql"], indirect=True)
def test_training_continues_without_its_mlflow_server(server, command, home, s3, mlflow_runs):
    """Killed after the first checkpoint, back after three more."""
    total, every = BATCH * 3_000, BATCH * 3_000 // 100
    words = ["--batch-size", str(BATCH), "--total-images", str(total), "--workers", "0"]
    words += ["--storage", f"{s3}/runs", "--run-id", "a", "--optim.lr_g", "3e-4", "--json"]
    training = command("train.py", "ring", *words)

    def saved(line: str) -> bool:
        return "saved checkpoint-" in line

    assert training.until(saved)
    server.kill()
    for _ in range(3):
        assert training.until(saved)
    assert sum(mirror.waiting(f"{s3}/runs").values()) >= 3
    server.start()
    result = training.result()
    assert result["images_seen"] == total
    mirror.sync(f"{s3}/runs")
    assert mirror.waiting(f"{s3}/runs") == {}
    (run,) = mlflow_runs(server.uri)
    assert run.info.run_id == json.loads(storage.read_bytes(f"{s3}/runs/a/mlflow.json"))["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr_g"] == "0.0003"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == "ring"
    images, _ = records.curve(f"{s3}/runs/a", "loss/D")
    assert images == list(range(every, total + 1, every))
    assert len([name for name in storage.list_names(f"{s3}/runs/a") if "checkpoint" in name]) == 10
    check_delivered(server.uri, run, f"{s3}/runs/a")


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_what_waits_is_delivered_from_the_store_when_the_node_is_gone(
    server, command, home, s3, mlflow_runs
):
    """The server stays away to the end, and the disk of the node goes with all that is on it."""
    words = ["--batch-size", str(BATCH), "--total-images", str(BATCH * 500), "--workers", "0"]
    words += ["--storage", f"{s3}/runs", "--run-id", "a", "--json"]
    training = command("train.py", "ring", *words)
    assert training.until(lambda line: "saved checkpoint-" in line)
    server.kill()
    training.result()
    shutil.rmtree(home / "runs", ignore_errors=True)
    server.start()
    assert mirror.sync(f"{s3}/runs")["a"] > 0
    assert mirror.sync(f"{s3}/runs/a") == {}
    (run,) = mlflow_runs(server.uri)
    assert run.info.status == "FINISHED"
    check_delivered(server.uri, run, f"{s3}/runs/a")


@pytest.mark.parametrize("server", ["sqlite"], indirect=True)
def test_a_sweep_continues_without_its_mlflow_server(server, command, home, s3, mlflow_runs):
    """Trials begin and end while the server is away, and so does the sweep."""
    words = ["--samples", "4", "--max-concurrent", "1", "--batch-size", str(BATCH)]
    words += ["--total-images", str(BATCH * 2_000), "--storage", f"{s3}/runs"]
    sweep = command("tune.py", "ring", *words, "--sweep-id", "s", "--json")
    assert sweep.until(lambda line: "1 of 4 have ended" in line), "".join(sweep.lines)
    server.kill()
    result = sweep.result()
    assert len(mirror.waiting(f"{s3}/runs")) >= 4
    server.start()
    mirror.sync(f"{s3}/runs")
    assert mirror.waiting(f"{s3}/runs") == {}
    runs = {run.info.run_name: run for run in mlflow_runs(server.uri)}
    assert len(mlflow_runs(server.uri)) == len(runs)
    states = {f"s-{trial['trial']}": trial["state"] for trial in result["trials"]}
    assert set(runs) == {"s", *states}
    parent = runs["s"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best.run_id"] == result["trials"][0]["run_id"]
    figures = MlflowClient(server.uri).list_artifacts(parent.info.run_id, "figures")
    assert {file.path for file in figures} == {"figures/sweep.png"}
    for name, state in states.items():
        run = runs[name]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FINISHED" if state == "done" else "KILLED"), name
        assert ("ended" in run.data.tags) == (state == "stopped early"), name
        check_delivered(server.uri, run, f"{s3}/runs/{name}")
