"""The workflow away from one's own machine: records in S3, a Ray job, Argo Workflows."""

import json
import os
import shutil

from mlflow import MlflowClient
from processes import command

from ivegan import storage

RING = ["ring", "--batch-size", "64", "--total-images", "12800", "--workers", "0"]


def test_a_run_kept_in_s3_is_resumed_from_another_folder_after_all_here_is_lost(
    home, store, s3, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    places = ["--storage", f"{s3}/runs", "--out", f"{s3}/reports", "--datastore", f"{s3}/metaflow"]
    words = ["workflow.py", "run", *RING, *places, "--run-id", "far"]
    command(*words, cwd=home, kill_at="train ivegan/checkpoint/content.py save 4")
    shutil.rmtree(home / "runs" / ".metaflow")
    (elsewhere := home / "elsewhere").mkdir()
    words = ["workflow.py", "resume", "--datastore", f"{s3}/metaflow", "--json"]
    out = command(*words, cwd=elsewhere).stdout
    result = json.loads(out.splitlines()[-1])
    assert "Cloning" in out
    assert result["checkpoint"] == f"{s3}/runs/far/checkpoint-0000012800"
    first = next(line for line in out.splitlines() if " of 12,800 " in line)
    assert int(first.split(" of ")[0].split()[-1].replace(",", "")) > 3 * 1280
    assert storage.read_bytes(result["report"]).startswith(b"<!doctype html>")
    assert not (elsewhere / "runs" / "checkpoints").exists()
    names = storage.list_files(f"{s3}/metaflow")
    assert any(name.endswith(".html") for name in names)  # the card
    assert len(MlflowClient(store).search_model_versions("name='ivegan-ring-encoder'")) == 1


def test_argo_workflows_get_steps_decorators_and_parameters_but_no_credentials(home, s3):
    out = command(
        *("workflow.py", "--datastore", f"{s3}/metaflow", "--with", "timeout:minutes=600"),
        *("--with", "retry:times=2", "argo-workflows", "create", "--only-json"),
        cwd=home,
        METAFLOW_KUBERNETES_CONTAINER_IMAGE="registry/ivegan:0.2.0",
        METAFLOW_KUBERNETES_SECRETS="ivegan-places",
    ).stdout
    template = json.loads(out)
    assert template["kind"] == "WorkflowTemplate"
    spec = template["spec"]
    parts = {part["name"]: part for part in spec["templates"]}
    order = ("start", "sweep", "train", "evaluate", "register", "end")
    for name in order:
        assert parts[name]["activeDeadlineSeconds"] == 600 * 60
        assert parts[name]["retryStrategy"]["limit"] == 2
        container = parts[name]["container"]
        assert container["image"] == "registry/ivegan:0.2.0"
        assert container["envFrom"][0]["secretRef"]["name"] == "ivegan-places"
        variables = {one["name"]: one["value"] for one in container["env"]}
        assert variables["METAFLOW_S3_ENDPOINT_URL"] == os.environ["AWS_ENDPOINT_URL"]
    assert {one["name"] for one in spec["arguments"]["parameters"]} == {"preset", "options"}
    assert "AWS_SECRET_ACCESS_KEY" not in out
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in out
    # The code that the pods fetch is in the store.
    of_train = {one["name"]: one["value"] for one in parts["train"]["container"]["env"]}
    assert of_train["METAFLOW_CODE_URL"].startswith(f"{s3}/metaflow/IveGanFlow/")
    assert storage.exists(of_train["METAFLOW_CODE_URL"])
