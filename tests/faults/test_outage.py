"""The MLflow server is killed under a training and under a sweep: nothing stops, is lost, or twice.

Everything is real: the commands, the server, its database, the object store under it.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import local_cluster
import pytest
from local_cluster import BUCKET, Cluster
from mlflow import MlflowClient
from processes import kill, program
from servers import all_servers, check_delivered

from ivegan import storage
from pipelines import record as records
from pipelines.tracking import mirror

BATCH = 64


@pytest.fixture(scope="module")
def servers() -> Iterator[Cluster]:
    """Run one MLflow server on PostgreSQL, with artifacts in S3, for all tests."""
    with all_servers() as cluster:
        yield cluster


@pytest.fixture
def cluster(servers: Cluster, home: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Return the servers; commands that start now find them."""
    for name, value in servers.environment.items():
        if not name.startswith("RAY_"):
            monkeypatch.setenv(name, value)
    return servers


@contextmanager
def started(home: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command of ours, whose lines are the clock of a test; kill it at the end."""
    with (home / "err").open("w") as err:
        process = subprocess.Popen(
            program(*words), cwd=home, stdout=subprocess.PIPE, stderr=err, text=True
        )
    with process:
        try:
            yield process
        finally:
            kill(process)


def until(process: subprocess.Popen[str], text: str) -> None:
    """Read lines to the first that contains a text."""
    assert process.stdout is not None
    assert any(text in line for line in process.stdout), f"it ended before it printed {text!r}"


def result_of(process: subprocess.Popen[str], home: Path) -> dict[str, Any]:
    """Return a command's JSON object, once it has ended well."""
    assert process.stdout is not None
    lines = process.stdout.read().splitlines()
    assert process.wait() == 0, (home / "err").read_text()[-3000:]
    return json.loads(lines[-1])


def test_training_continues_without_its_mlflow_server(cluster, home, mlflow_runs):
    """Killed after the first checkpoint, back after three more."""
    total, every, runs = BATCH * 3_000, BATCH * 3_000 // 100, f"s3://{BUCKET}/back"
    words = ["--batch-size", str(BATCH), "--total-images", str(total), "--workers", "0"]
    words += ["--storage", runs, "--run-id", "a", "--optim.lr_g", "3e-4", "--json"]
    with started(home, "train.py", "ring", *words) as training:
        until(training, "saved checkpoint-")
        local_cluster.end(cluster, "mlflow", kill=True)
        for _ in range(3):
            until(training, "saved checkpoint-")
        assert sum(mirror.waiting(runs).values()) >= 3
        local_cluster.start_mlflow(cluster)
        assert result_of(training, home)["images_seen"] == total
    mirror.sync(runs)
    assert mirror.waiting(runs) == {}
    (run,) = [one for one in mlflow_runs(cluster.url("mlflow")) if one.info.run_name == "a"]
    assert run.info.run_id == json.loads(storage.read_bytes(f"{runs}/a/mlflow.json"))["run_id"]
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr_g"] == "0.0003"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.digest == "ring"
    images, _ = records.curve(f"{runs}/a", "loss/D")
    assert images == list(range(every, total + 1, every))
    assert len([name for name in storage.list_names(f"{runs}/a") if "checkpoint" in name]) == 10
    check_delivered(MlflowClient(cluster.url("mlflow")), run, f"{runs}/a")


def test_what_waits_is_delivered_from_the_store_when_the_node_is_gone(cluster, home, mlflow_runs):
    """The server stays away to the end, and the disk of the node goes with all that is on it."""
    runs = f"s3://{BUCKET}/gone"
    words = ["--batch-size", str(BATCH), "--total-images", str(BATCH * 500), "--workers", "0"]
    words += ["--storage", runs, "--run-id", "b", "--json"]
    with started(home, "train.py", "ring", *words) as training:
        until(training, "saved checkpoint-")
        local_cluster.end(cluster, "mlflow", kill=True)
        result_of(training, home)
    shutil.rmtree(home / "runs", ignore_errors=True)
    local_cluster.start_mlflow(cluster)
    assert mirror.sync(runs)["b"] > 0
    assert mirror.sync(f"{runs}/b") == {}
    (run,) = [one for one in mlflow_runs(cluster.url("mlflow")) if one.info.run_name == "b"]
    assert run.info.status == "FINISHED"
    check_delivered(MlflowClient(cluster.url("mlflow")), run, f"{runs}/b")


@pytest.mark.timeout(1800)
def test_a_sweep_continues_without_its_mlflow_server(cluster, home, mlflow_runs):
    """Trials begin and end while the server is away, and so does the sweep."""
    folder = f"s3://{BUCKET}/sweep"
    words = ["--samples", "3", "--max-concurrent", "1", "--batch-size", str(BATCH)]
    words += ["--total-images", str(BATCH * 600), "--storage", folder]
    with started(home, "tune.py", "ring", *words, "--sweep-id", "s", "--json") as sweep:
        until(sweep, "1 of 3 have ended")
        local_cluster.end(cluster, "mlflow", kill=True)
        result = result_of(sweep, home)
    assert len(mirror.waiting(folder)) >= 3
    local_cluster.start_mlflow(cluster)
    mirror.sync(folder)
    assert mirror.waiting(folder) == {}
    found = [run for run in mlflow_runs(cluster.url("mlflow")) if run.info.run_name[0] == "s"]
    runs = {run.info.run_name: run for run in found}
    states = {f"s-{trial['trial']}": trial["state"] for trial in result["trials"]}
    assert sorted(run.info.run_name for run in found) == sorted(["s", *states])
    parent = runs["s"]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["best.run_id"] == result["trials"][0]["run_id"]
    client = MlflowClient(cluster.url("mlflow"))
    figures = client.list_artifacts(parent.info.run_id, "figures")
    assert {file.path for file in figures} == {"figures/sweep.png"}
    for name, state in states.items():
        run = runs[name]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == ("FINISHED" if state == "done" else "KILLED"), name
        assert ("ended" in run.data.tags) == (state == "stopped early"), name
        check_delivered(client, run, f"{folder}/{name}")
