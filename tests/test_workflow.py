"""The workflow from data to registered models, unbroken, and killed and resumed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ivegan.config import preset
from ivegan.errors import UserError
from pipelines import registry, workflow

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.mark.fault
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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "rnig"], "There is no preset 'rnig'"),
        (["run", "mnist"], "needs --data"),
        (["run", "ring", "--set", "optim.lr=1"], "optim.lr"),
        (["run", "ring", "--bogus", "1"], "There is no flag --bogus"),
        (["resume", "--bogus", "1"], "There is no flag --bogus"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_status_2(home, words, sentence):
    done = run(*words, cwd=home, status=2)
    assert sentence in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (home / "runs").exists()


def test_changes_take_the_type_of_their_setting():
    found = workflow.changes_of("optim.lr_g=1e-4, seed=3,transform.condition=true", preset("ring"))
    assert found == {"optim.lr_g": 1e-4, "seed": 3, "transform.condition": True}
    with pytest.raises(UserError, match=r"seed takes a int, but got 'x'"):
        workflow.changes_of("seed=x", preset("ring"))
    with pytest.raises(UserError, match="needs a value"):
        workflow.changes_of("seed", preset("ring"))
