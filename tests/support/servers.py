"""Real servers on loopback that tests kill and start again, by ``infra/local_cluster.py``."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import local_cluster
from local_cluster import Cluster
from mlflow import MlflowClient
from mlflow.entities import Run

from ivegan import storage
from pipelines import record as records


@contextmanager
def s3_server(folder: Path) -> Iterator[Cluster]:
    """Run an S3 server of a test's own; the folder keeps its objects when it is killed."""
    cluster = local_cluster.prepare(folder, folder / "cluster.json")
    try:
        local_cluster.start_s3(cluster)
        yield cluster
    finally:
        local_cluster.end(cluster, "s3", kill=True)


def s3_variables(cluster: Cluster) -> dict[str, str]:
    """Return the variables that lead a client to a cluster's S3 server."""
    return {
        "AWS_ENDPOINT_URL": cluster.url("s3"),
        "AWS_ACCESS_KEY_ID": "ivegan:ivegan",
        "AWS_SECRET_ACCESS_KEY": cluster.secrets["s3"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def check_delivered(client: MlflowClient, run: Run, run_uri: str) -> None:
    """Check that MLflow has every point and figure of a run's folder, and each of them once."""
    points: dict[str, list[tuple[int, float, int]]] = defaultdict(list)
    for point in records.read_metrics(run_uri):
        for name, value in point.metrics.items():
            points[name].append((point.images_seen, value, point.time))
    assert {name for name in run.data.metrics if not name.startswith("eval/")} == set(points)
    for name, wanted in points.items():
        assert len({step for step, _, _ in wanted}) == len(wanted)
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted((p.step, p.value, p.timestamp) for p in history) == sorted(wanted), name
    figures = {f"figures/{name}" for name in storage.list_names(f"{run_uri}/figures")}
    assert {f.path for f in client.list_artifacts(run.info.run_id, "figures")} == figures
