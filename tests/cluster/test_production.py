"""The production topology as processes: a head without CPUs, two nodes, token, accounts and keys.

One cluster for all tests, each of which takes minutes on two cores.
"""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import local_cluster
import local_demo
import pytest
import requests
from leaks import leaks
from local_cluster import BUCKET, Cluster
from mlflow import MlflowClient
from servers import check_delivered

from data_prep.building import build
from ivegan import checkpoint, storage
from ivegan.config import preset
from ivegan.errors import UserError
from pipelines import record as records
from pipelines.tracking import client as tracking
from pipelines.tracking.mirror import sync
from pipelines.training import fit
from pipelines.training import plan as planning

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

RUNS, DATA = f"s3://{BUCKET}/runs", f"s3://{BUCKET}/data/digits"
TRAINING = ("pipelines/train.py", "digits", "--data", DATA, "--storage", RUNS, "--resume")
TRAINING += ("--total-images", "7680", "--save-every", "1280", "--log-every", "640")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Return a cluster that is up, in whose environment this process is."""
    state = tmp_path_factory.mktemp("cluster") / "cluster.json"
    cluster = local_cluster.up(state)
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("IVEGAN_TEST_DATA", raising=False)  # digits are faster
        for name, value in cluster.environment.items():
            if not name.startswith("RAY_"):  # this process may have a Ray of other tests
                environment.setenv(name, value)
        yield cluster
    local_cluster.down(state)


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, shards: None) -> bytes:
    """Return the weights of a run that nothing disturbs."""
    local_demo.submit(cluster, *TRAINING, "--run-id", "unbroken")
    each_metric_once("unbroken")
    return weights("unbroken")


@pytest.fixture(scope="module")
def shards(cluster: Cluster) -> None:
    """Build the digits, unless the whole way has."""
    build("digits", source=None, out=DATA, workers=0)


def until(cluster: Cluster, job: str, event: str) -> None:
    """Return once an object exists that a job writes."""
    while not storage.exists(event):
        assert local_cluster.ask_ray(cluster, f"/api/jobs/{job}")["status"] != "FAILED"
        time.sleep(0.5)  # between two looks; the test's timeout ends them


def each_metric_once(run_id: str) -> None:
    """Check that MLflow has every point of a run's record, and each once."""
    sync(storage.join(RUNS, run_id))
    client = MlflowClient()
    (run,) = client.search_runs(
        [e.experiment_id for e in client.search_experiments()],
        f"attributes.run_name = '{run_id}'",
    )
    assert run.info.status == "FINISHED"
    assert "system/cpu_utilization_percentage" in run.data.metrics
    check_delivered(client, run, storage.join(RUNS, run_id))


def weights(run_id: str) -> bytes:
    """Return the weights of a run's newest checkpoint."""
    newest = checkpoint.find(f"{RUNS}/{run_id}")
    return storage.read_bytes(storage.join(newest, "weights.safetensors"))


def test_the_whole_way(cluster):
    local_demo.demo(cluster)
    (run,) = [
        n
        for n in storage.list_names(RUNS)
        if records.exists(storage.join(RUNS, n))
        and records.read_record(storage.join(RUNS, n)).kind == "train"
        and n.count("-") == 1
    ]
    record = records.read_record(storage.join(RUNS, run))
    assert record.git_commit.startswith("package-")
    each_metric_once(run)
    assert storage.exists(f"s3://{BUCKET}/reports/{run}/report.html")
    version = MlflowClient().get_model_version_by_alias("ivegan-digits-encoder", "production")
    assert version.tags["run_id"] == run
    assert (Path(cluster.folder) / "pulled" / "weights.safetensors").exists()
    for node in local_cluster.NODES:  # both trained
        assert (Path(cluster.folder) / node / "cache").exists()


def test_requests_without_token_or_account_are_refused(cluster):
    jobs = requests.get(cluster.url("dashboard") + "/api/jobs/", timeout=30)
    assert jobs.status_code in (401, 403)
    experiments = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert requests.get(cluster.url("mlflow") + experiments, timeout=30).status_code == 401


def test_an_account_that_may_only_read_is_refused_before_it_trains(cluster, monkeypatch):
    local_cluster.make_account(cluster, "reader", "of-one-test-only")
    tracking.check(cluster.url("mlflow"), "ivegan-digits")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of-one-test-only")
    with pytest.raises(UserError, match=r"reader may not add runs .* choose another with --exp"):
        tracking.check(cluster.url("mlflow"), "ivegan-digits")
    tracking.check(cluster.url("mlflow"), "of-the-reader")
    plan = planning.resolve("digits", preset("digits"), planning.Run(workers=0))
    with pytest.raises(UserError, match="reader may not add runs"):  # nor is one resumed untracked
        fit._open_tracking(plan, resumed=True)


def test_no_secret_stands_in_logs_states_jobs_or_records(cluster):
    texts = {str(p): p.read_bytes() for p in _logs(cluster)}
    states = ["/api/jobs/"]
    kinds = ("actors", "tasks", "workers", "runtime_envs", "jobs", "nodes")
    states += [f"/api/v0/{kind}?detail=1&limit=1000" for kind in kinds]
    texts |= {s: json.dumps(local_cluster.ask_ray(cluster, s)).encode() for s in states}
    for name in storage.list_files(RUNS):
        if name.endswith(("run.json", "sweep.json", "config.json", "mlflow.json")):
            texts[name] = storage.read_bytes(storage.join(RUNS, name))
    assert len(texts) > 50
    assert b"ivegan:ivegan" not in texts["/api/jobs/"]
    assert leaks(cluster.secrets, texts) == {}


def _logs(cluster: Cluster) -> list[Path]:
    """Return the logs of all servers."""
    logs = Path(cluster.folder).glob("*/ray/session_latest/logs/**/*")
    own = [Path(cluster.folder) / f"{name}.log" for name in cluster.processes]
    return [*own, *(path for path in logs if path.is_file())]


def test_a_submitted_workflow_leaves_all_outside_its_folder(cluster):
    words = ["pipelines/workflow.py", "run", "ring", "--batch-size", "64", "--workers", "1"]
    words += ["--total-images", "12800", "--run-id", "job"]
    places = {name: f"s3://{BUCKET}/{name}" for name in ("storage", "out", "datastore")}
    local_demo.submit(cluster, *words, *(f"--{name}={place}" for name, place in places.items()))
    assert checkpoint.find(f"{places['storage']}/job").endswith("checkpoint-0000012800")
    assert storage.exists(f"{places['out']}/job/report.html")
    assert storage.list_names(f"{places['datastore']}/IveGanFlow")
    assert MlflowClient().get_model_version_by_alias("ivegan-ring-encoder", "staging")


def test_a_job_without_places_or_room_prints_what_to_do(cluster, capfd):
    for words, sentence in (
        (("train.py", "digits"), "set MLFLOW_TRACKING_URI, --storage"),
        (("workflow.py", "run", "ring", "--storage", RUNS, "--out", RUNS), "--datastore to places"),
        (
            ("train.py", "ring", "--storage", RUNS, "--workers", "64", "--wait-for-nodes", "6"),
            "room for 2 of 64 workers of 1 CPU each(?s:.*)room for 2 after waiting 6 s; lower",
        ),
    ):
        with pytest.raises(SystemExit):
            local_demo.submit(cluster, f"pipelines/{words[0]}", *words[1:])
        assert re.search(sentence, "".join(capfd.readouterr()))


def test_a_run_that_lost_a_node_ends_with_the_weights_of_an_unbroken_one(cluster, unbroken):
    broken = (*TRAINING, "--run-id", "broken", "--wait-for-nodes", "600")
    job = local_demo.submit(cluster, *broken, wait=False)
    until(cluster, job, f"{RUNS}/broken/checkpoint-0000001280/config.json")
    local_cluster.end(cluster, "node-1", kill=True)
    local_cluster.start_node(cluster, "node-1")
    local_demo.finish(cluster, job)
    assert weights("broken") == unbroken
    each_metric_once("broken")


def test_a_node_whose_end_is_announced_saves_a_checkpoint_first(cluster, unbroken):
    noticed = (*TRAINING, "--run-id", "noticed", "--save-every", "7680", "--wait-for-nodes", "600")
    job = local_demo.submit(cluster, *noticed, wait=False)
    until(cluster, job, f"{RUNS}/noticed/metrics")
    listing = local_cluster.ask_ray(cluster, "/api/v0/nodes?detail=1")["data"]["result"]["result"]
    (leaving,) = [n for n in listing if (n["node_name"], n["state"]) == ("node-1", "ALIVE")]
    words = ["--node-id", leaving["node_id"], "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    words += ["--reason-message", "a spot node", "--deadline-remaining-seconds", "120"]
    words += ["--address", f"{local_cluster.HOST}:{cluster.ports['ray']}"]
    command = [local_cluster.program("ray"), "drain-node", *words]
    subprocess.run(command, env=local_cluster.environment_of(cluster), check=True)
    while not (saved := checkpoint.checkpoints(f"{RUNS}/noticed")):
        time.sleep(0.5)  # between two looks; the test's timeout ends them
    local_cluster.end(cluster, "node-1", kill=True)
    local_cluster.start_node(cluster, "node-1")
    local_demo.finish(cluster, job)
    assert not saved[0].endswith("0000007680")  # the only one that was due
    assert weights("noticed") == unbroken
    each_metric_once("noticed")


def test_an_elastic_run_continues_on_the_node_that_is_left(cluster, shards):
    elastic = (*TRAINING, "--run-id", "elastic", "--workers", "1:2", "--keep", "0")
    job = local_demo.submit(cluster, *elastic, wait=False)
    until(cluster, job, f"{RUNS}/elastic/checkpoint-0000001280/config.json")
    local_cluster.end(cluster, "node-1", kill=True)
    local_demo.finish(cluster, job)
    local_cluster.start_node(cluster, "node-1")
    sizes = {
        checkpoint.read_metadata(uri)["world_size"]
        for uri in checkpoint.checkpoints(f"{RUNS}/elastic")
    }
    assert sizes == {1, 2}
    seen = [point.images_seen for point in records.read_metrics(f"{RUNS}/elastic")]
    assert seen == list(range(640, 7680 + 1, 640))
    each_metric_once("elastic")


def test_a_sweep_goes_through_an_outage_of_mlflow_and_s3(cluster, shards):
    words = ["pipelines/tune.py", "digits", "--data", DATA, "--storage", RUNS, "--sweep-id", "s"]
    words += ["--samples", "2", "--scores", "2", "--total-images", "6400", "--score-images", "200"]
    job = local_demo.submit(cluster, *words, wait=False)
    until(cluster, job, f"{RUNS}/s-000/run.json")
    for name in ("mlflow", "s3"):
        local_cluster.end(cluster, name, kill=True)
    time.sleep(30)  # the outage
    local_cluster.start_s3(cluster)
    local_cluster.start_mlflow(cluster)
    local_demo.finish(cluster, job)
    assert records.read_record(f"{RUNS}/s").status == "FINISHED"
    for run in ("s-000", "s-001"):
        if records.read_record(f"{RUNS}/{run}").status == "FINISHED":
            each_metric_once(run)
