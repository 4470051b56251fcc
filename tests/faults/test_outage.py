"""The MLflow server is killed under a training: nothing stops, is lost, or arrives twice.

Everything is real: the command, the server, its database, the object store under it.
"""

import json
import subprocess
from pathlib import Path

import local_cluster
import pytest
from local_cluster import BUCKET
from mlflow import MlflowClient
from processes import kill, program
from servers import check_delivered

from ivegan import storage
from pipelines import record as records
from pipelines.tracking import mirror


def test_training_continues_without_its_mlflow_server(
    home: Path, monkeypatch: pytest.MonkeyPatch, mlflow_runs
) -> None:
    """Killed after the first checkpoint, back after three more."""
    total, runs = 64 * 3_000, f"s3://{BUCKET}/back"
    words = ["--batch-size", "64", "--total-images", str(total), "--workers", "0"]
    words += ["--storage", runs, "--run-id", "a", "--optim.lr_g", "3e-4", "--json"]
    with local_cluster.servers() as cluster:
        for name, value in cluster.environment.items():
            if not name.startswith("RAY_"):
                monkeypatch.setenv(name, value)
        command = program("train.py", "ring", *words)
        with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, text=True) as training:
            assert training.stdout is not None
            try:
                saved = (line for line in training.stdout if "saved checkpoint-" in line)
                assert next(saved)
                local_cluster.end(cluster, "mlflow", kill=True)
                assert [next(saved) for _ in range(3)]
                assert sum(mirror.waiting(runs).values()) >= 3
                local_cluster.start_mlflow(cluster)
                lines = training.stdout.read().splitlines()
                assert training.wait() == 0
            finally:
                kill(training)
        assert json.loads(lines[-1])["images_seen"] == total
        mirror.sync(runs)
        assert mirror.waiting(runs) == mirror.sync(f"{runs}/a") == {}
        (run,) = [one for one in mlflow_runs(cluster.url("mlflow")) if one.info.run_name == "a"]
        assert run.info.run_id == json.loads(storage.read_bytes(f"{runs}/a/mlflow.json"))["run_id"]
        assert run.info.status == "FINISHED"
        assert run.data.params["optim.lr_g"] == "0.0003"
        (dataset,) = run.inputs.dataset_inputs
        assert dataset.dataset.digest == "ring"
        images = [p.images_seen for p in records.points_with(f"{runs}/a", "loss/D")]
        assert images == list(range(total // 100, total + 1, total // 100))
        names = storage.list_names(f"{runs}/a")
        assert len([name for name in names if "checkpoint" in name]) == 10
        check_delivered(MlflowClient(cluster.url("mlflow")), run, f"{runs}/a")
