"""A project folder may have any name, be moved and be copied; an MLflow store is named as it is."""

import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import processes
import pytest
from local_cluster import servers
from mlflow import MlflowClient

from ivegan import storage
from ivegan.errors import UserError
from pipelines.tracking import client as tracking

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ["train.py", "ring", "--workers", "0", "--total-images", "2048", "--run-id"]


def command(folder: Path, *words: str) -> None:
    """Run a command of ours in a folder, without a home and with a long TMPDIR."""
    temporary = folder.parent / ("t" * 90)
    temporary.mkdir(exist_ok=True)
    processes.command(*words, cwd=folder, HOME="/dev/null", TMPDIR=str(temporary))


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_project_with_any_name_is_moved_and_copied(home: Path, tmp_path: Path) -> None:
    first, moved, copy = (tmp_path / name for name in ("a b%41 é'#", "b ?%20", "copy"))
    first.mkdir()
    command(first, *TRAIN, "one")
    command(first, "registry.py", "register", "runs/checkpoints/one")
    first.rename(moved)
    command(moved, "registry.py", "sync")
    command(moved, "registry.py", "pull", "ivegan-ring-encoder", "--stage", "staging", "--to", "e")
    command(moved, *TRAIN, "two")
    command(moved, "registry.py", "register", "runs/checkpoints/two")
    assert not first.exists()
    artifacts = (moved / "runs" / "artifacts").as_uri()
    with sqlite3.connect(moved / "runs" / "mlflow.db") as database:
        for table, column in tracking._LOCATIONS:
            for (where,) in database.execute(f"SELECT {column} FROM {table}").fetchall():
                places = (artifacts, "models:/")  # and that of MLflow's Default
                assert not where or where.startswith(places) or where.endswith("/mlruns/0"), where

    shutil.copytree(moved, copy)
    before = files(moved)
    command(copy, *TRAIN, "three")
    command(copy, "evaluate.py", "runs/checkpoints/one", "--out", "runs/reports/one")
    command(copy, "registry.py", "sync")
    command(copy, "registry.py", "pull", "ivegan-ring-encoder", "--stage", "2", "--to", "e2")
    assert files(moved) == before
    assert {path for path in tmp_path.iterdir() if path.name != "t" * 90} == {moved, copy}


@pytest.mark.slow
def test_ray_starts_where_the_temporary_folder_has_a_long_path(home: Path) -> None:
    words = ["1" if word == "0" else word for word in TRAIN]
    command(home, *words, "one", "--batch-size", "256")


def test_several_first_runs_at_once_make_one_store(home: Path) -> None:
    code = "from pipelines.tracking.client import check; check('sqlite:///runs/m.db', 'ivegan-x')"
    with ThreadPoolExecutor(2) as pool:
        words = [sys.executable, "-c", code]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        runs = [
            pool.submit(subprocess.run, words, cwd=home, env=environment, capture_output=True)
            for _ in range(2)
        ]
    assert [run.result().returncode for run in runs] == [0] * 2, runs[0].result().stderr
    experiments = MlflowClient(f"sqlite:///{home}/runs/m.db").search_experiments()
    assert sorted(one.name for one in experiments) == ["Default", "ivegan-x"]


def test_an_experiment_that_was_deleted_is_named(store: str) -> None:
    tracking.check(store, "ivegan-ring")
    client = MlflowClient(store)
    found = client.get_experiment_by_name("ivegan-ring")
    assert found is not None
    client.delete_experiment(found.experiment_id)
    with pytest.raises(UserError, match=r"was deleted in MLflow: `mlflow experiments restore"):
        tracking.check(store, "ivegan-ring")
    tracking.check(store, "another")


def test_a_store_of_another_mlflow_is_named_with_its_remedy(store: str, home: Path) -> None:
    with sqlite3.connect(home / "runs" / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with pytest.raises(UserError, match=r"refuses: .*out-of-date.*mlflow db upgrade"):
        tracking.check(store, "ivegan-ring")


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("mysql+nodriver://host/db", r"needs a driver that is not installed .*ivegan\[server\]"),
        ("databricks", r"MLflow at databricks refuses: .*credential"),
        (
            "postgresql://u:sesame@127.0.0.1:9/x",
            r"No MLflow store answers at postgresql://127.*:9/x",
        ),
    ],
)
def test_a_store_that_cannot_be_used_is_named(uri: str, sentence: str, monkeypatch) -> None:
    monkeypatch.setattr("mlflow.store.db.utils.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(UserError, match=sentence) as caught:
        tracking.check(uri, "ivegan-ring")
    assert "sesame" not in str(caught.value)


@pytest.mark.slow
def test_a_database_that_lets_nobody_in_is_no_outage() -> None:
    with servers() as cluster:
        if "postgresql" not in cluster.database:
            pytest.skip("install PostgreSQL (postgres and initdb) to test MLflow on it")
        uri = cluster.database.replace(cluster.secrets["database"], "sesame")
        with pytest.raises(UserError, match=r"refuses: .*authentication failed") as caught:
            tracking.check(uri, "ivegan-ring")
    assert not isinstance(caught.value, storage.Unavailable)
    assert "sesame" not in str(caught.value)
