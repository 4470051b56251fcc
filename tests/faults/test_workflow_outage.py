"""A workflow whose MLflow server is away for a moment: the step is tried again, and that is all."""

import pytest
from cards import pictures_of
from fault_proxy import Fault, FaultProxy, Request, times
from local_cluster import servers
from mlflow import MlflowClient
from processes import command


@pytest.mark.timeout(1800)
def test_a_step_is_tried_again_when_mlflow_was_away_and_prints_no_password(home, monkeypatch):
    """The first look of the training and of the registration at the server get no answer."""
    plans = [
        times(1, Fault(drop=True), lambda request, part=part: part in request.path)
        for part in ("experiments/get-by-name", "model-versions/search")
    ]

    def plan(request: Request) -> Fault | None:
        return next((fault for one in plans if (fault := one(request))), None)

    with servers() as cluster, FaultProxy(cluster.url("mlflow"), plan) as proxy:
        account = cluster.environment["MLFLOW_TRACKING_USERNAME"], cluster.secrets["account"]
        done = command(
            *("workflow.py", "run", "ring", "--batch-size", "64", "--total-images", "1280"),
            *("--workers", "0"),
            cwd=home,
            MLFLOW_TRACKING_URI=proxy.endpoint.replace("://", f"://{':'.join(account)}@"),
            MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        )
        assert proxy.injected == {"drop": 2}
        output = done.stdout + done.stderr
        assert output.count("Task is starting (retry).") == 2
        assert output.count("No MLflow store answers at http://127.0.0.1") >= 2
        assert cluster.secrets["account"] not in output
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            monkeypatch.setenv(name, cluster.environment[name])
        client = MlflowClient(cluster.url("mlflow"))
        assert len(client.search_model_versions("name='ivegan-ring-encoder'")) == 1
        (card,) = (home / "runs" / ".metaflow").rglob("steps/evaluate/tasks/*/cards/*.html")
        figures = list((home / "runs" / "reports").rglob("*.png"))
        assert pictures_of(card) == len(figures) > 0
