"""The workflow from data to registered models: a whole run, a reused one, and mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cards import pictures_of
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY
from mlflow import MlflowClient
from processes import command

from ivegan import storage
from ivegan.config import preset
from ivegan.errors import UserError
from pipelines import workflow as workflow_command
from pipelines.flows import flow, runner, steps
from pipelines.models.pull import pull

RING = ["run", "ring", "--batch-size", "64", "--total-images", "1280", "--workers", "0"]


def workflow(*words: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    return command("workflow.py", *words, cwd=cwd, status=status)


def test_workflow_ends_with_models_in_staging_and_numbers_in_mlflow(home, store):
    done = workflow(*RING, "--run-id", "whole", "--json", cwd=home)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["run_id"] == "whole"
    assert result["images_seen"] == 1280
    assert result["registered"]["stage"] == "staging"
    assert "models:/ivegan-ring-encoder@staging" in done.stdout
    assert re.search(r"^  Modes found +\d", done.stdout, re.MULTILINE)
    assert Path(result["report"]).read_text().startswith("<!doctype html>")
    assert len(list((home / "runs" / ".metaflow").rglob("cards/*.html"))) == 1
    assert not (home / ".metaflow").exists()  # everything is below runs/
    client = MlflowClient(store)
    tracked = client.get_run(result["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["eval/modes"] == result["evaluation"]["eval/modes"]
    assert client.get_model_version_by_alias("ivegan-ring-generator", "staging").version
    pull("ivegan-ring-generator", stage="staging", to=home / "got")
    assert "| Modes found |" in (home / "got" / "model_card.md").read_text()  # as it was evaluated


@pytest.mark.slow
def test_equal_inputs_reuse_the_sweep_and_the_training_unless_anew(home, store):
    space = "optim.lr_g=1e-3 optim.lr_d= model.z_dim= model.noise_dim="
    sweep = ["--sweep-samples", "1", "--sweep-images", "640", "--sweep-space"]
    words = [*RING, "--json", *sweep]
    first = json.loads(workflow(*words, space, cwd=home).stdout.splitlines()[-1])
    assert first["sweep"]["best_config"] == {"optim.lr_g": 1e-3}
    assert first["run_id"].startswith("ring-")
    assert len(first["run_id"]) == len("ring-") + 12
    best = MlflowClient(store).get_run(first["mlflow_run_id"])
    assert best.data.tags["sweep"] == first["sweep"]["sweep_id"]
    assert not first["reused"]
    (card,) = (home / "runs" / ".metaflow").rglob("steps/sweep/tasks/*/cards/*.html")
    assert pictures_of(card) == 1  # the sweep's
    metadata = json.loads((Path(first["checkpoint"]) / "config.json").read_text())
    assert metadata["config"]["optim"]["lr_g"] == 1e-3  # trained with the sweep's best
    before = sorted((home / "runs" / "checkpoints").iterdir())

    # The same space, written in another way.
    space = "optim.lr_d= optim.lr_g=0.001 model.noise_dim= model.z_dim="
    done = workflow(*words, space, cwd=home)
    second = json.loads(done.stdout.splitlines()[-1])
    assert f"{first['run_id']} is trained already" in done.stdout
    assert second["reused"]
    same = ("run_id", "mlflow_run_id", "checkpoint", "images_seen", "evaluation", "report", "sweep")
    assert {k: second[k] for k in same} == {k: first[k] for k in same}
    assert not second["registered"]["new"]
    assert sorted((home / "runs" / "checkpoints").iterdir()) == before

    other = [*RING, "--run-id", first["run_id"], "--optim.lr_d", "1e-3"]
    assert "cannot be resumed with other settings" in workflow(*other, cwd=home, status=2).stderr
    third = workflow(*words, space, "--run-id", "third", "--anew", cwd=home)
    result = json.loads(third.stdout.splitlines()[-1])
    assert result["run_id"] == "third"
    assert not result["reused"]
    assert result["sweep"]["sweep_id"] == "third-sweep"
    assert result["evaluation"] == first["evaluation"]
    refused = workflow(*words, space, "--run-id", "third", "--anew", cwd=home, status=2)
    assert "third exists: choose another --run-id" in refused.stderr


@pytest.mark.slow
def test_mistake_in_a_step_is_one_sentence_and_not_retried(home):
    done = workflow("run", "mnist", "--data", str(home / "nothing"), cwd=home, status=2)
    assert "nothing" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stdout
    assert "retry" not in done.stdout


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("No."), METAFLOW_EXIT_DISALLOW_RETRY), (storage.Unavailable("Away."), 1)],
)
def test_a_failed_step_leaves_its_sentence_alone(error, status, tmp_path, monkeypatch, capfd):
    def fail(_: object) -> None:
        raise error

    def crash(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setenv(runner.MISTAKE, str(tmp_path / "mistake"))
    with pytest.raises(SystemExit) as stop:
        flow.final(fail)(None)
    assert stop.value.code == status
    assert capfd.readouterr() == (f"{error}\n", "")
    assert (tmp_path / "mistake").read_text() == str(error)
    with pytest.raises(ZeroDivisionError):
        flow.final(crash)(None)
    assert not (tmp_path / "mistake").exists()  # it is of the earlier attempt


def test_the_last_run_is_the_last_resume_that_began(tmp_path, monkeypatch):
    monkeypatch.setenv("METAFLOW_DATASTORE_SYSROOT_LOCAL", str(tmp_path))
    for name in (
        "9/_parameters/1/x",
        "10/_parameters/1/x",
        "10/start/1/x",
        "11/_meta/_self.json",
        "argo-x/_parameters/1/x",
    ):
        storage.write_bytes(tmp_path / ".metaflow" / "IveGanFlow" / name, b"")
    (tmp_path / ".metaflow" / "IveGanFlow" / "latest_run").write_text("9")  # Metaflow's own note
    assert runner.origin_of(None) == "10"
    for run_id in ("9", "argo-x"):
        assert runner.origin_of(run_id) == run_id
    with pytest.raises(UserError, match=f"There is no workflow 11 in {tmp_path}"):
        runner.origin_of("11")


def test_metaflows_cache_is_not_shared_with_other_users(home, monkeypatch):
    """The first user of a machine would own it."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    runner.prepare_environment(None)
    assert f"/ivegan-{os.getuid()}/" in os.environ["METAFLOW_CLIENT_CACHE_PATH"]


def test_a_workflow_that_metaflow_ends_names_its_continuation(tmp_path, monkeypatch, capsys):
    ending = tmp_path / "flow.py"
    ending.write_text("print('a line'); raise SystemExit(3)")
    monkeypatch.setattr(runner, "_FLOW", ending)
    with pytest.raises(SystemExit) as stop:
        runner.run(["run"])
    assert stop.value.code == 3
    out, err = capsys.readouterr()
    assert out == "a line\n"
    assert "continue it with `workflow.py resume`" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "ring", "--sweep-space", "seed=0,1"], "need --sweep-samples"),
        (["run", "ring", "--sweep-samples", "2", "--sweep-space", "sede=0,1"], "sede"),
        (["run", "ring", "--datastore", "gs://bucket"], "unknown scheme"),
        (["resume"], "There is no workflow to resume in"),
        (["run", "ring", "--set", "optim.lr=1"], "optim.lr"),
    ],
)
def test_wrong_command_line_is_one_sentence_and_status_2(
    home, words, sentence, monkeypatch, capsys
):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # Metaflow's variables are set there
    monkeypatch.setattr(sys, "argv", ["workflow.py", *words])
    with pytest.raises(SystemExit) as stop:
        workflow_command.command()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not (home / "runs").exists()


def test_changes_take_the_type_of_their_setting():
    ring = preset("ring")
    changes = steps.parse_changes("optim.lr_g=1e-4, seed=3,transform.condition=true", ring)
    assert changes == {"optim.lr_g": 1e-4, "seed": 3, "transform.condition": True}
    with pytest.raises(UserError, match="needs a value"):
        steps.parse_changes("seed", ring)
    with pytest.raises(UserError, match="unexpected keyword argument 'worker': check --options"):
        steps.options_of({"worker": 2})
