"""MLflow mirrors run folders: each point once, deleted runs stay deleted, parents come first."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ivegan.config import preset, to_dict
from ivegan.errors import UserError
from pipelines import record as records
from pipelines.record import MetricsWriter, RunRecord
from pipelines.tracking.mirror import forget, mirror, mirrored, run_id_of, sync, waiting


def run_folder(storage: Path, run_id: str = "a", status: str = "FINISHED", **changes) -> str:
    """Write the record of a run with three flushes and a figure; return its URI."""
    run_uri = str(storage / run_id)
    record = RunRecord(
        run_id=run_id,
        preset="ring",
        config=to_dict(preset("ring")),
        dataset_hash="ring",
        experiment="ivegan-ring",
        key=records.new_key(run_id),
        status=status,
        **changes,
    )
    records.write_record(run_uri, record)
    writer = MetricsWriter(run_uri)
    for images_seen in (64, 128, 192):
        writer.add(images_seen, {"loss/D": images_seen / 64, "other": float("nan")})
    writer.add_figure("samples", 192, b"png")
    writer.close()
    return run_uri


def points(uri: str, run_id: str, name: str = "loss/D") -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in MlflowClient(uri).get_metric_history(run_id, name)]


def test_a_run_is_copied_once_however_often_it_is_mirrored(store, home, mlflow_runs, caplog):
    """A point is never rewritten, and a link out of the folder is left out."""
    run_uri = run_folder(home / "runs")
    Path(run_uri, "figures", "password.png").symlink_to("/etc/passwd")
    records.write_points(run_uri, 128, {"loss/D": 9.0})
    assert mirror(run_uri, store) == 5
    assert mirror(run_uri, store) == 0
    Path(run_uri, "mlflow.json").unlink()  # as if the mirror had been killed before it
    assert mirror(run_uri, store) == 5
    (run,) = mlflow_runs(store)
    assert points(store, run.info.run_id) == [(64, 1.0), (128, 2.0), (192, 3.0)]
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) == {"loss/D"}
    files = MlflowClient(store).list_artifacts(run.info.run_id, "figures")
    assert [file.path for file in files] == ["figures/samples-0000000192.png"]
    assert "figures/password.png leads out of" in caplog.text
    assert waiting(home / "runs") == {}


def test_a_run_deleted_in_mlflow_stays_deleted(store, home, mlflow_runs):
    run_uri = run_folder(home / "runs", status="RUNNING")
    mirror(run_uri, store)
    MlflowClient(store).delete_run(run_id_of(run_uri))
    records.end_record(run_uri, "FINISHED")
    for _ in range(2):
        assert mirror(run_uri, store) == 0
    Path(run_uri, "mlflow.json").unlink()
    assert mirror(run_uri, store) == 0
    assert mlflow_runs(store) == []


def test_a_repeated_evaluation_replaces_its_numbers_and_files(store, home, mlflow_runs):
    run_uri = run_folder(home / "runs")
    folder = Path(records.evaluation_uri(run_uri, 192))
    folder.mkdir()
    metadata = {"config": to_dict(preset("ring"))}
    for value in (0.9, 0.5, 0.5):
        found = {"metrics": {"eval/modes": 8.0, "eval/near": value}, "metadata": metadata}
        (folder / "metrics.json").write_text(json.dumps(found))
        (folder / "report.html").write_text(f"near {value}")
        forget(run_uri, str(folder))
        mirror(run_uri, store)
    (run,) = mlflow_runs(store)
    assert run.data.metrics["eval/near"] == 0.5
    assert points(store, run.info.run_id, "eval/modes") == [(192, 8.0)]
    assert points(store, run.info.run_id, "eval/near") == [(192, 0.9), (192, 0.5)]
    place = MlflowClient(store).download_artifacts(run.info.run_id, "evaluation/report.html")
    assert Path(place).read_text() == "near 0.5"
    folder.rename(records.evaluation_uri(run_uri, 256))  # of a later checkpoint, equal numbers
    mirror(run_uri, store)
    assert points(store, run.info.run_id, "eval/modes") == [(192, 8.0), (256, 8.0)]


def test_two_mirrors_at_once_leave_one_run(store, home, mlflow_runs):
    run_uri = run_folder(home / "runs")

    def copy(_: int) -> None:
        with contextlib.suppress(MlflowException):  # both write the parameters; the next call ends
            mirror(run_uri, store)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(copy, range(2)))
    mirror(run_uri, store)
    (run,) = mlflow_runs(store)
    assert points(store, run.info.run_id) == [(64, 1.0), (128, 2.0), (192, 3.0)]


def test_a_parent_is_mirrored_before_its_child(store, home, mlflow_runs):
    child = run_folder(home / "runs", "a-000", parent="a")
    run_folder(home / "runs", "a", kind="sweep")
    mirror(child, store)
    runs = {run.info.run_name: run for run in mlflow_runs(store)}
    assert runs["a-000"].data.tags["mlflow.parentRunId"] == runs["a"].info.run_id
    assert sync(home / "runs").keys() == {"a"}


def test_a_running_record_of_a_dead_driver_is_killed(store, home, mlflow_runs):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    run_uri = run_folder(home / "runs", status="RUNNING", pid=dead.pid)
    alive = run_folder(home / "runs", "alive", status="RUNNING")
    sync(home / "runs")
    assert records.read_record(run_uri).status == "KILLED"
    assert records.read_record(alive).status == "RUNNING"
    assert {run.info.status for run in mlflow_runs(store)} == {"KILLED", "RUNNING"}


def test_an_outage_is_logged_and_sync_copies_the_rest(store, home, monkeypatch, caplog):
    uri = "http://user:sesame@127.0.0.1:9/x"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_uri = run_folder(home / "runs")
    with mirrored(run_uri, uri):
        pass
    assert "registry.py sync" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x.*try sync again") as raised:
        sync(home / "runs")
    assert "sesame" not in caplog.text + str(raised.value)
    assert "sesame" not in "".join(p.read_text() for p in Path(run_uri).rglob("*") if p.is_file())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert sync(home / "runs") == {"a": 4}


def test_a_continued_run_is_one_run_in_mlflow(store, home, mlflow_runs):
    run_uri = run_folder(home / "runs", status="KILLED", tags={"ended": "early"})
    mirror(run_uri, store)
    record = dataclasses.replace(records.read_record(run_uri), status="RUNNING", tags={})
    records.write_record(run_uri, record)
    records.write_points(run_uri, 256, {"loss/D": 4.0})
    mirror(run_uri, store)
    (run,) = mlflow_runs(store)
    assert (run.info.status, "ended" in run.data.tags) == ("RUNNING", False)
    assert len(points(store, run.info.run_id)) == 4


def test_a_record_of_version_0_1_0_is_read(home):
    old = {"preset": "ring", "run_id": "old", "dataset_hash": "ring", "accumulate": 2}
    old |= {"threads_per_worker": 1, "run_key": "old-1", "config": to_dict(preset("ring"))}
    (home / "old").mkdir()
    (home / "old" / "run.json").write_text(json.dumps(old))
    record = records.read_record(str(home / "old"))
    assert (record.accumulate, record.key, record.precision) == (2, "old-1", "float32")
    assert waiting(home) == {}  # its journal delivers it


def test_a_damaged_record_does_not_block_the_others(store, home, mlflow_runs, caplog):
    damaged, other = run_folder(home / "runs", "a"), run_folder(home / "runs", "b")
    Path(damaged, "run.json").write_text('{"schema": 1, "run_id": ')
    Path(other, "metrics", "0000000128.jsonl").write_bytes(b"\0\0")
    with pytest.raises(UserError, match=r"a/run\.json is damaged"):
        sync(home / "runs")
    (run,) = mlflow_runs(store)
    assert points(store, run.info.run_id) == [(64, 1.0), (192, 3.0)]
    assert "0000000128.jsonl is damaged" in caplog.text
