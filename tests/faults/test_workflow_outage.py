"""A workflow whose MLflow server is away for a moment: the step is tried again, and that is all."""

import os
import subprocess
import sys
from pathlib import Path

from cards import pictures_of
from fault_proxy import Fault, FaultProxy, Request, times
from mlflow import MlflowClient
from mlflow_server import MlflowServer

PROGRAM = Path(__file__).resolve().parents[2] / "pipelines" / "workflow.py"


def test_a_step_is_tried_again_when_mlflow_was_away_and_prints_no_password(home, store):
    """The first look of the training and of the registration at the server get no answer."""
    plans = [
        times(1, Fault(drop=True), lambda request, part=part: part in request.path)
        for part in ("experiments/search", "model-versions/search")
    ]

    def plan(request: Request) -> Fault | None:
        return next((fault for one in plans if (fault := one(request))), None)

    server = MlflowServer(home, store, str(home / "artifacts"))
    server.start()
    try:
        with FaultProxy(server.uri, plan) as proxy:
            words = ["run", "ring", "--batch-size", "64", "--total-images", "1280", "--workers"]
            done = subprocess.run(
                [sys.executable, PROGRAM, *words, "0"],
                cwd=home,
                capture_output=True,
                text=True,
                check=False,
                env=os.environ
                | {
                    "MLFLOW_TRACKING_URI": proxy.endpoint.replace("://", "://user:sesame@"),
                    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
                },
            )
            assert proxy.injected == {"drop": 2}
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-3000:]
        assert output.count("Task is starting (retry).") == 2
        assert output.count("No MLflow store answers at http://127.0.0.1") >= 2
        assert "sesame" not in output
        found = MlflowClient(server.uri).search_model_versions("name='ivegan-ring-encoder'")
        assert len(found) == 1
        (card,) = (home / "runs" / ".metaflow").rglob("steps/evaluate/tasks/*/cards/*.html")
        figures = list((home / "runs" / "reports").rglob("*.png"))
        assert pictures_of(card) == len(figures) > 0
    finally:
        server.kill()
