"""Ray jobs: commands submitted to a head run on its cluster and keep nothing in its folder."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from processes import free_ports, kill, wait_for

from data_prep.building import build
from ivegan import checkpoint

ROOT = Path(__file__).resolve().parents[2]
Submit = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def submit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submit]:
    """Start a Ray head, and return a function that runs a command as a job with variables."""
    port, dashboard, client, agent = free_ports(4)
    ray = str(Path(sys.executable).with_name("ray"))
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts sockets below it
    words = [
        *("--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--temp-dir={folder}"),
        *(f"--dashboard-agent-listen-port={agent}", "--dashboard-host=127.0.0.1"),
    ]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        job = [ray, "job", "submit", "--address", f"http://127.0.0.1:{dashboard}", *words]
        return subprocess.run(job, env=env, capture_output=True, text=True, check=False)

    def job(variables: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
        runtime = json.dumps({"env_vars": variables})
        places = ["--working-dir", str(ROOT), "--runtime-env-json", runtime]
        return run(*places, "--", sys.executable, *words)

    log = tmp_path_factory.mktemp("head") / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen([ray, "start", *words], env=env, stdout=out, stderr=out)
    try:
        # The dashboard answers long before the agent takes jobs.
        wait_for(lambda: run("--no-wait", "--", "true").returncode == 0, head, log)
        yield job
    finally:
        kill(head)  # asked to end, it would wait half a minute for its own children
        shutil.rmtree(folder, ignore_errors=True)


def output_of(done: subprocess.CompletedProcess[str], *, succeeds: bool = True) -> str:
    """Return what a job printed, after a check that it succeeded or failed."""
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == succeeds, output
    return output


def test_a_submitted_training_leaves_all_outside_its_folder(submit, home, store):
    variables = {"MLFLOW_TRACKING_URI": store, "IVEGAN_GIT_COMMIT": "abc1234"}
    variables |= {"IVEGAN_CACHE": f"{home}/cache"}
    script = ["pipelines/train.py", "digits", "--total-images", "5000", "--json"]
    places = ["--storage", f"{home}/store", "--data", f"{home}/digits"]
    build("digits", source=None, out=f"{home}/digits", workers=0)
    output_of(submit(variables, *script, *places, "--run-id", "job"))
    metadata = checkpoint.read_metadata(checkpoint.find(f"{home}/store/job"))
    assert (metadata["config"]["total_images"], metadata["world_size"]) == (5000, 2)
    mirrored = json.loads((home / "store/job/mlflow.json").read_text())
    run = MlflowClient(store).get_run(mirrored["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["git_commit"] == "abc1234"
    assert run.data.metrics["loss/D"] > 0
    # Without places outside its folder the job fails and prints what to set.
    assert "set --storage" in output_of(submit(variables, *script), succeeds=False)
    # Nodes that nothing adds are waited for, and reported.
    many = ["ring", "--workers", "64", "--wait-for-nodes", "6", *places[:2], "--run-id", "many"]
    output = output_of(submit(variables, script[0], *many), succeeds=False)
    assert "waiting for nodes: room for 2 of 64 workers of 1 CPU each" in output
    assert "room for 2 after waiting 6 s; lower --workers" in output


@pytest.mark.slow
def test_a_submitted_workflow_leaves_all_outside_its_folder(submit, home, store):
    variables = {"MLFLOW_TRACKING_URI": store, "IVEGAN_CACHE": f"{home}/cache"}
    script = ["pipelines/workflow.py", "run", "ring", "--batch-size", "64", "--workers", "1"]
    script += ["--total-images", "12800", "--json"]
    places = [f"--{name}={home}/{name}" for name in ("storage", "out", "datastore")]
    output_of(submit(variables, *script, "--run-id", "job", *places))
    assert (home / "storage/job/checkpoint-0000012800/config.json").exists()
    assert (home / "out/job/report.html").exists()
    assert (home / "datastore/.metaflow/IveGanFlow/latest_run").exists()
    assert MlflowClient(store).get_model_version_by_alias("ivegan-ring-encoder", "staging")
    output = output_of(submit(variables, *script), succeeds=False)
    assert "set --storage, --out, --datastore and MLFLOW_TRACKING_URI to places outside" in output
