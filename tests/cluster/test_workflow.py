"""The workflow from data to registered models, unbroken, and killed and resumed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cards import pictures_of
from mlflow import MlflowClient

from ivegan.config import override, preset
from ivegan.errors import UserError
from pipelines import registry, workflow
from pipelines.training.plan import Run, resolve

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(ROOT / "pipelines" / "workflow.py")]


def run(*words: str, cwd: Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*PROGRAM, *words], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_a_workflow_ends_with_models_in_staging_and_numbers_in_mlflow(home, store):
    words = ["run", "ring", "--batch-size", "64", "--total-images", "1280", "--workers", "0"]
    done = run(*words, "--run-id", "whole", "--json", cwd=home)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["run_id"] == "whole"
    assert result["images_seen"] == 1280
    assert result["registered"]["stage"] == "staging"
    assert "models:/ivegan-ring-encoder@staging" in done.stdout
    assert "modes of the mixture are reached" in done.stdout
    assert Path(result["report"]).read_text().startswith("<!doctype html>")
    assert len(list((home / "runs" / ".metaflow").rglob("cards/*.html"))) == 1
    assert not (home / ".metaflow").exists()  # everything is below runs/
    client = MlflowClient(store)
    tracked = client.get_run(result["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["eval/modes"] == result["evaluation"]["eval/modes"]
    assert client.get_model_version_by_alias("ivegan-ring-generator", "staging").version
    registry.pull("ivegan-ring-generator", stage="staging", to=home / "got")
    assert "| Modes found |" in (home / "got" / "model_card.md").read_text()  # as it was evaluated


@pytest.mark.slow
def test_a_killed_workflow_goes_on_where_it_stopped(home, store):
    """All its processes get SIGKILL in the middle of training; preparing is not done again."""
    words = ["run", "ring", "--batch-size", "64", "--total-images", "640000", "--workers", "0"]
    process = subprocess.Popen(
        [*PROGRAM, *words, "--run-id", "cut"],
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "checkpoint-" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert "checkpoint-" in seen[-1], "".join(seen)
    done = run("resume", "--json", cwd=home)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["run_id"] == "cut"
    assert result["images_seen"] == 640000
    first = next(line for line in done.stdout.splitlines() if " of 640,000 " in line)
    assert int(first.split(" of ")[0].split()[-1].replace(",", "")) > 64000  # not from the start
    assert "Cloning" in done.stdout + done.stderr
    assert len(MlflowClient(store).search_model_versions("name='ivegan-ring-encoder'")) == 1


@pytest.mark.slow
def test_a_new_run_with_equal_inputs_trains_nothing_unless_it_is_told_to(home, store):
    """The sweep and the training of the first run serve the second, which registers nothing new."""
    words = ["run", "ring", "--batch-size", "64", "--total-images", "1280", "--workers", "0"]
    space = "optim.lr_g=1e-3 optim.lr_d= model.z_dim= model.noise_dim="
    words += ["--sweep-samples", "1", "--sweep-images", "640", "--sweep-space", space, "--json"]
    first = json.loads(run(*words, "--run-id", "first", cwd=home).stdout.splitlines()[-1])
    assert first["sweep"]["sweep_id"] == "first-sweep"
    assert first["sweep"]["best_config"] == {"optim.lr_g": 1e-3}
    best = MlflowClient(store).get_run(first["mlflow_run_id"])
    assert best.data.tags["sweep"] == "first-sweep"
    assert not first["reused"]
    cards = home / "runs" / ".metaflow"
    (card,) = cards.rglob("steps/sweep/tasks/*/cards/*.html")
    assert pictures_of(card) == 1  # the sweep's
    facts = json.loads((Path(first["checkpoint"]) / "config.json").read_text())
    assert facts["config"]["optim"]["lr_g"] == 1e-3  # trained with what the sweep found
    before = sorted((home / "runs" / "checkpoints").iterdir())

    # The same space, written in another way.
    words[words.index(space)] = "optim.lr_d= optim.lr_g=0.001 model.noise_dim= model.z_dim="
    done = run(*words, "--run-id", "second", cwd=home)
    second = json.loads(done.stdout.splitlines()[-1])
    assert "reusing the finished sweep first-sweep of equal settings" in done.stdout
    assert "the run first had equal settings" in done.stdout
    assert second["reused"]
    same = ("run_id", "mlflow_run_id", "checkpoint", "images_seen", "evaluation", "report")
    assert {k: second[k] for k in same} == {k: first[k] for k in same}
    assert not second["registered"]["new"]
    assert sorted((home / "runs" / "checkpoints").iterdir()) == before

    third = run(*words, "--run-id", "third", "--anew", cwd=home)
    result = json.loads(third.stdout.splitlines()[-1])
    assert result["run_id"] == "third"
    assert not result["reused"]
    assert result["sweep"]["sweep_id"] == "third-sweep"
    assert result["evaluation"] == first["evaluation"]
    refused = run(*words, "--run-id", "third", "--anew", cwd=home, status=2)
    assert "third exists: choose another --run-id" in refused.stderr


def test_a_mistake_that_only_a_step_can_see_is_one_sentence_and_not_tried_again(home):
    done = run("run", "mnist", "--data", str(home / "nothing"), cwd=home, status=2)
    assert "nothing" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stdout
    assert "retry" not in done.stdout


@pytest.mark.slow
def test_a_step_that_takes_too_long_is_ended_tried_again_and_then_left(home, store):
    """Its time is 6 s; a thousand million images take longer."""
    words = ["run", "ring", "--total-images", "1000000000", "--workers", "0"]
    done = run(*words, "--limits", "train=0.1,retries=1", cwd=home, status=1)
    assert "Task is starting (retry)." in done.stdout
    assert done.stdout.count("Step train timed out after 0 hours, 0 minutes, 6 seconds") >= 2
    assert "`workflow.py resume` goes on from there" in done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "ring", "--limits", "trian=1"], "--limits knows no 'trian'"),
        (["run", "ring", "--sweep-samples", "-1"], "--sweep-samples is -1"),
        (["run", "ring", "--sweep-space", "seed=0,1"], "need --sweep-samples"),
        (["run", "ring", "--sweep-samples", "2", "--sweep-space", "sede=0,1"], "sede"),
        (["run", "ring", "--datastore", "gs://bucket"], "unknown scheme"),
        (["run", "ring", "--precision", "half"], "--precision is 'half'"),
        (["resume"], "There is no workflow to resume in"),
        (["resume", "--limits", "train=0"], "must be 1 second to 1 year"),
        (["run", "rnig"], "There is no preset 'rnig'"),
        (["run", "mnist"], "needs --data"),
        (["run", "ring", "--set", "optim.lr=1"], "optim.lr"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_status_2(home, words, sentence):
    done = run(*words, cwd=home, status=2)
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (home / "runs").exists()


def test_a_finished_training_that_is_spoilt_is_told_and_made_again(store, capsys):
    config = override(preset("ring"), {"batch_size": 64, "total_images": 640})
    flow = SimpleNamespace(anew=False)

    def go(run_id: str) -> dict[str, Any]:
        run = Run(workers=0, run_id=run_id, resume=True)
        return workflow.train_or_reuse(flow, resolve("ring", config, run))

    first = go("first")
    capsys.readouterr()
    assert go("first") == first
    assert "first is trained already" in capsys.readouterr().out
    assert go("second") == {**first, "reused": True}
    assert "the run first had equal settings" in capsys.readouterr().out
    (Path(first["checkpoint"]) / "training.pt").unlink()
    third = go("third")
    assert "cannot be used" in capsys.readouterr().out
    assert not third["reused"]
    weights = [Path(r["checkpoint"]) / "weights.safetensors" for r in (first, third)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert go("fourth")["run_id"] == "third"  # the new one serves from now on


def test_changes_take_the_type_of_their_setting():
    found = workflow.changes_of("optim.lr_g=1e-4, seed=3,transform.condition=true", preset("ring"))
    assert found == {"optim.lr_g": 1e-4, "seed": 3, "transform.condition": True}
    with pytest.raises(UserError, match=r"seed takes a int, but got 'x'"):
        workflow.changes_of("seed=x", preset("ring"))
    with pytest.raises(UserError, match="needs a value"):
        workflow.changes_of("seed", preset("ring"))
