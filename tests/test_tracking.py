"""Tracking: an MLflow server that dies stops nothing, and nothing is lost or doubled."""

import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from processes import free_ports, kill, wait_for

from pipelines import tracking

DATASET = ("ring", "abc", "ring")


def started(uri: str, run_id: str | None = None) -> str:
    return tracking.start_run(
        uri,
        experiment="ivegan-ring",
        run_name="a",
        params={"optim.lr_g": 0.1},
        tags={"preset": "ring"},
        config={"dataset": "ring"},
        dataset=DATASET,
        run_id=run_id,
    )


def points(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in MlflowClient(uri).get_metric_history(run_id, name)]


@pytest.fixture
def server(
    tmp_path: Path, empty_store: Path
) -> Iterator[tuple[str, Callable[[], subprocess.Popen]]]:
    """Return (URI, function): it starts the MLflow server, always on the same port and store."""
    store = tmp_path / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    running: list[subprocess.Popen] = []
    (port,) = free_ports(1)
    uri = f"http://127.0.0.1:{port}"
    words = ["--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{store}"]
    words += ["--artifacts-destination", str(tmp_path / "artifacts")]

    log = tmp_path / "server.log"

    def answers() -> bool:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
        except OSError:
            return False
        return True

    def start() -> subprocess.Popen:
        program = str(Path(sys.executable).with_name("mlflow"))
        with log.open("a") as out:
            running.append(
                subprocess.Popen([program, "server", *words], stdout=out, stderr=out, cwd=tmp_path)
            )
        wait_for(answers, running[-1], log)
        return running[-1]

    yield uri, start
    for process in running:
        kill(process)


@pytest.mark.fault
def test_an_outage_holds_nothing_up_and_loses_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_LAST_CHANCE", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, start = server
    path = tmp_path / "journal" / "a.jsonl"
    process = start()
    run_id = started(uri)
    journal = tracking.Journal.open(path, uri, run_id)
    tracker = tracking.Tracker(journal)
    for step in range(10):
        tracker.log({"loss": step / 10}, step)
    kill(process)
    for step in range(10, 20):
        tracker.log({"loss": step / 10}, step)
    tracker.figure("samples", b"png", 20)
    tracker.close()
    tracking.end_run(uri, run_id, "FINISHED", journal)
    assert tracking.waiting(path.parent)[run_id] >= 12
    start()
    assert MlflowClient(uri).get_run(run_id).info.status == "RUNNING"
    assert tracking.deliver(path.parent)[run_id] >= 12
    assert tracking.deliver(path.parent) == {}
    assert points(uri, run_id, "loss") == [(step, step / 10) for step in range(20)]
    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    kept = [f.path for f in MlflowClient(uri).list_artifacts(run_id, "figures")]
    assert kept == ["figures/samples-0000000020.png"]


def test_a_resumed_run_repeats_no_point(store, tmp_path):
    run_id = started(store)
    for steps in (range(5), range(3, 8)):  # the second starts from an earlier checkpoint
        tracker = tracking.Tracker(tracking.Journal.open(tmp_path / "a.jsonl", store, run_id))
        for step in steps:
            tracker.log({"loss": float(step)}, step)
        tracker.close()
    assert started(store, run_id) == run_id
    assert points(store, run_id, "loss") == [(step, float(step)) for step in range(8)]


def test_a_point_sent_twice_is_one_point(store, tmp_path):
    """The process dies between MLflow's answer and the note that it came."""
    run_id = started(store)
    tracker = tracking.Tracker(tracking.Journal.open(tmp_path / "a.jsonl", store, run_id))
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    (tmp_path / "a.sent").unlink()
    assert tracking.deliver(tmp_path) == {run_id: 1}
    assert points(store, run_id, "loss") == [(1, 1.0)]


def test_a_journal_cut_in_the_middle_of_a_line_goes_on(store, tmp_path):
    run_id = started(store)
    journal = tracking.Journal.open(tmp_path / "a.jsonl", store, run_id)
    journal.add_metrics({"loss": 1.0}, 1)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"metrics": {"lo')
    journal = tracking.Journal.open(tmp_path / "a.jsonl", store, run_id)
    journal.add_metrics({"loss": 2.0}, 2)
    assert tracking.deliver(tmp_path) == {run_id: 2}
    assert points(store, run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_infinite_losses_are_left_out(store, tmp_path):
    run_id = started(store)
    tracker = tracking.Tracker(tracking.Journal.open(tmp_path / "a.jsonl", store, run_id))
    tracker.log({"loss": float("nan"), "other": 1.0}, 1)
    tracker.close()
    assert set(MlflowClient(store).get_run(run_id).data.metrics) == {"other"}


def test_no_password_is_written_down(tmp_path):
    path = tmp_path / "a.jsonl"
    tracking.Journal.open(path, "https://user:secret@mlflow.example/x", "run").add({"file": "f"})
    assert "secret" not in path.read_text()
    assert "https://mlflow.example/x" in path.read_text()


def test_an_evaluation_goes_under_its_run_and_nowhere_else(store, tmp_path):
    run_id = started(store)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.html").write_text("<p>")
    folder, found = tmp_path / "report", {"eval/one_nn": 0.5}
    assert tracking.add_report(store, run_id, found, 640, folder)
    assert points(store, run_id, "eval/one_nn") == [(640, 0.5)]
    kept = [f.path for f in MlflowClient(store).list_artifacts(run_id, "evaluation")]
    assert kept == ["evaluation/report.html"]
    assert not tracking.add_report(store, "0" * 32, found, 640, folder)
