"""The MLflow client keeps credentials to itself, and journals of version 0.1 are delivered once."""

import json
import subprocess

import mlflow
import pytest
from mlflow import MlflowClient
from processes import program

from ivegan.config import preset
from ivegan.errors import UserError
from pipelines.models.stages import overview
from pipelines.paths import tracking_uri
from pipelines.tracking import client as tracking
from pipelines.tracking import journals
from pipelines.tracking.mirror import sync
from pipelines.training import plan as planning


def test_no_password_appears_when_no_server_answers(home, monkeypatch, capfd):
    """MLflow's own errors hold the whole URI."""
    uri = "http://user:sesame@127.0.0.1:9/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x") as caught:
        overview()
    assert "sesame" not in str(caught.value)
    for words in (["--dry-run", "--json"], ["--total-images", "64"]):
        subprocess.run(program("train.py", "ring", *words, "--workers", "0"), check=False)
    plan = planning.resolve("ring", preset("ring"), planning.Run(workers=0))
    assert plan.tracking_uri == uri
    out, err = capfd.readouterr()
    assert '"tracking_uri": "http://127.0.0.1:9/x"' in out
    assert "No MLflow store answers at http://127.0.0.1:9/x" in err
    files = "".join(p.read_text() for p in home.rglob("*") if p.is_file())
    assert "sesame" not in out + err + repr(plan) + files


def test_a_journal_of_version_0_1_is_delivered_once(home, store, mlflow_runs):
    """An outage left its end unsent; sync of the runs beside it brings that."""
    start = {
        "experiment": "ivegan-ring",
        "run_name": "old",
        "params": {"optim.lr_g": "0.1"},
        "tags": {"preset": "ring"},
        "config": {"dataset": "ring"},
        "dataset": ["ring", "abc", "ring"],
        "parent": None,
    }
    lines = [
        {"uri": store, "run_key": "old-0123456789ab", "kept": None},
        {"start": start, "timestamp": 1000},
        {"metrics": {"loss/D": 1.5}, "step": 64, "timestamp": 2000},
        {"file": "figures/samples-0000000064.png", "timestamp": 2000},
        {"file": "figures/password.png", "timestamp": 2000},
        {"tags": {"best": "x"}, "timestamp": 3000},
        {"status": "FINISHED", "timestamp": 4000},
    ]
    folder = home / "runs" / "journal"
    (folder / "old" / "figures").mkdir(parents=True)
    (folder / "old" / "figures" / "samples-0000000064.png").write_bytes(b"png")
    (folder / "old" / "figures" / "password.png").symlink_to("/etc/passwd")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "old.jsonl").write_text(text + '{"cut')
    (home / "runs" / "checkpoints").mkdir()
    assert journals.waiting(folder) == {"old-0123456789ab": 6}
    ((run_id, count),) = sync(home / "runs" / "checkpoints").items()
    assert count == 6
    assert sync(home / "runs" / "checkpoints") == journals.waiting(folder) == {}
    (run,) = mlflow_runs(store)
    assert run.info.run_id == run_id
    assert (run.info.status, run.data.tags["best"]) == ("FINISHED", "x")
    history = MlflowClient(store).get_metric_history(run_id, "loss/D")
    assert [(p.step, p.value, p.timestamp) for p in history] == [(64, 1.5, 2000)]
    paths = [file.path for file in MlflowClient(store).list_artifacts(run_id, "figures")]
    assert paths == ["figures/samples-0000000064.png"]


def test_a_store_that_is_opened_does_not_become_the_users_choice(store):
    tracking.client(store)
    assert mlflow.get_tracking_uri() == store
    assert tracking_uri("http://another:5000") == "http://another:5000"


def test_an_error_without_a_text_is_named_by_its_kind():
    assert tracking.first_line(TimeoutError()) == "TimeoutError"
    assert tracking.first_line(OSError("http://u:p@a/x is away\nmore")) == "http://a/x is away"
