"""A workflow killed in each of its steps and resumed: nothing finished is redone or comes out else.

The whole process group gets SIGKILL from inside a step, at a certain call of a certain function
(``killer/sitecustomize.py``), so that every run of these tests kills at the same place.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ivegan import storage

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = [sys.executable, str(ROOT / "pipelines" / "workflow.py")]
RUN = ["run", "ring", "--batch-size", "64", "--total-images", "12800", "--workers", "0"]
RUN += ["--run-id", "one", "--json"]
# Of one value: which of two values wins may depend on the order in which trials come to a rung.
SPACE = "optim.lr_g=1e-3 optim.lr_d= model.z_dim= model.noise_dim="
SWEEP = ["--sweep-samples", "2", "--sweep-images", "1280", "--sweep-space", SPACE]
PLACES = {
    "start": "flows/steps.py prepare 1",
    "sweep": "sweeps/report.py on_trial_result 5",
    "train": "ivegan/checkpoint.py save 4",
    "evaluate": "ivegan/evaluation/report.py render 1",  # measured, but not written
    "register": "mlflow/tracking/client.py create_model_version 2",  # one half is, the other not
    "end": "flow.py end 1",
}


def workflow(*words: str, cwd: Path, kill_at: str = "") -> str:
    """Return what the command prints, after seeing that it ended as it should."""
    env = dict(os.environ)
    if kill_at:
        paths = f"{ROOT}/tests/support/killer{os.pathsep}{env.get('PYTHONPATH', '')}"
        env |= {"KILL_AT": kill_at, "PYTHONPATH": paths}
    done = subprocess.run(
        [*PROGRAM, *words],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    expected = -signal.SIGKILL if kill_at else 0
    assert done.returncode == expected, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def outcome(result: dict[str, Any]) -> dict[str, Any]:
    """Return all of a result that must not depend on where a run was cut."""
    weights = storage.read_bytes(storage.join(result["checkpoint"], "weights.safetensors"))
    return {
        "weights": hashlib.sha256(weights).hexdigest(),
        "images_seen": result["images_seen"],
        "evaluation": result["evaluation"],
        "best": result["sweep"] and result["sweep"]["best_config"],
        "registered": {
            half: {k: result["registered"][half][k] for k in ("version", "stage")}
            for half in ("encoder", "generator")
        },
    }


def cloned(home: Path, run_id: str) -> set[str]:
    """Return the steps that a run took over, after Metaflow's own records of its tasks."""
    steps = home / "runs" / ".metaflow" / "IveGanFlow" / run_id
    return {note.parents[2].name for note in steps.glob("*/*/_meta/*origin-task-id*")} - {
        "_parameters"
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, empty_store):
    """Return a function that returns the outcome of an uninterrupted run, with or without sweep."""
    found: dict[bool, dict[str, Any]] = {}

    def get(sweep: bool) -> dict[str, Any]:
        if sweep not in found:
            home = tmp_path_factory.mktemp("unbroken")
            (home / "runs").mkdir()
            shutil.copy(empty_store, home / "runs" / "mlflow.db")
            output = workflow(*RUN, *(SWEEP if sweep else []), cwd=home)
            found[sweep] = outcome(json.loads(output.splitlines()[-1]))
        return found[sweep]

    return get


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("step", ["sweep", "train", "register"])
def test_a_workflow_killed_in_any_step_ends_as_if_it_had_not(home, store, unbroken, step):
    sweep = step in ("sweep", "train")
    workflow(*RUN, *(SWEEP if sweep else []), cwd=home, kill_at=f"{step} {PLACES[step]}")
    output = workflow("resume", "--json", cwd=home)
    result = json.loads(output.splitlines()[-1])
    before = set(list(PLACES)[: list(PLACES).index(step)]) - (set() if sweep else {"sweep"})
    assert cloned(home, result["metaflow_run"]) == before
    assert outcome(result) == unbroken(sweep)
    client = MlflowClient(store)
    for half in ("encoder", "generator"):
        assert len(client.search_model_versions(f"name='ivegan-ring-{half}'")) == 1
    if step == "train":  # from its checkpoint, not from the start
        first = next(line for line in output.splitlines() if " of 12,800 " in line)
        assert int(first.split(" of ")[0].split()[-1].replace(",", "")) > 3 * 1280
