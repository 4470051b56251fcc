"""A workflow killed in three of its steps and resumed: no finished work is repeated or differs.

The whole process group gets SIGKILL from inside a step, at a certain call of a certain function
(``killer/sitecustomize.py``), so that every run of this test kills at the same place.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from processes import command

from ivegan import storage

RUN = ["run", "ring", "--batch-size", "64", "--total-images", "12800", "--workers", "0"]
# Of one value: which of two values wins may depend on the order in which trials come to a rung.
RUN += ["--sweep-samples", "2", "--sweep-images", "1280", "--run-id", "one", "--json"]
RUN += ["--sweep-space", "optim.lr_g=1e-3 optim.lr_d= model.z_dim= model.noise_dim="]
PLACES = {
    "sweep": "sweeps/report.py on_trial_result 5",
    "train": "ivegan/checkpoint/content.py save 4",
    "register": "mlflow/tracking/client.py create_model_version 2",  # one half is, the other not
}


def workflow(*words: str, cwd: Path, kill_at: str = "") -> str:
    return command("workflow.py", *words, cwd=cwd, kill_at=kill_at).stdout


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


@pytest.mark.timeout(1800)
def test_a_workflow_killed_in_several_steps_ends_as_if_it_had_not(
    home, store, empty_store, tmp_path_factory
):
    whole = tmp_path_factory.mktemp("whole")
    (whole / "runs").mkdir()
    shutil.copy(empty_store, whole / "runs" / "mlflow.db")
    unbroken = json.loads(workflow(*RUN, cwd=whole).splitlines()[-1])

    words, outputs = RUN, []
    for step, place in PLACES.items():
        outputs.append(workflow(*words, cwd=home, kill_at=f"{step} {place}"))
        words = ["resume", "--json"]
    outputs.append(workflow(*words, cwd=home))
    result = json.loads(outputs[-1].splitlines()[-1])
    steps = home / "runs" / ".metaflow" / "IveGanFlow" / result["metaflow_run"]
    # Metaflow's own notes of the tasks that a run took over.
    cloned = {note.parents[2].name for note in steps.glob("*/*/_meta/*origin-task-id*")}
    assert cloned - {"_parameters"} == {"start", "sweep", "train", "evaluate"}
    assert outcome(result) == outcome(unbroken)
    client = MlflowClient(store)
    for half in ("encoder", "generator"):
        assert len(client.search_model_versions(f"name='ivegan-ring-{half}'")) == 1
    # The training continued from its checkpoint, not from the start.
    first = next(line for line in outputs[2].splitlines() if " of 12,800 " in line)
    assert int(first.split(" of ")[0].split()[-1].replace(",", "")) > 3 * 1280
