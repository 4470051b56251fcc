"""A workflow leaves no secret of its environment anywhere, even where all loggers are at DEBUG."""

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from leaks import contents, leaks
from local_cluster import ACCOUNT, BUCKET, servers

from ivegan import storage

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
# Not AWS_SESSION_TOKEN: Ray Tune copies variables of AWS to where Ray's logs show them.
UNUSED = ("MLFLOW_TRACKING_TOKEN", "RAY_AUTH_TOKEN")
UNUSED += ("METAFLOW_SERVICE_AUTH_KEY", "RAY_REDIS_PASSWORD")


def test_a_workflow_leaves_no_secret(home: Path) -> None:
    """All credentials are canaries: those of the servers, and others that nothing asks for."""
    (home / "sitecustomize.py").write_text("import logging\nlogging.basicConfig(level=10)\n")
    ray = Path(f"/tmp/{secrets.token_hex(4)}")  # the paths of Ray's sockets are long
    with servers() as cluster:
        canaries = cluster.secrets | {name: secrets.token_hex(16) for name in UNUSED}
        store = cluster.url("mlflow").replace("://", f"://{ACCOUNT}:{canaries['account']}@")
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))
        }
        places = {n: f"s3://{BUCKET}/{n}" for n in ("data", "storage", "out", "datastore")}
        words = ["run", "digits", "--total-images", "640", "--batch-size", "64", "--json"]
        words += ["--model.width", "0.25", "--sweep-samples", "1", "--workers", "2"]
        words += [word for name, place in places.items() for word in (f"--{name}", place)]
        done = subprocess.run(
            [sys.executable, ROOT / "pipelines" / "workflow.py", *words],
            cwd=home,
            env=kept
            | {name: canaries[name] for name in UNUSED}
            | {
                "MLFLOW_TRACKING_URI": store,
                "AWS_ENDPOINT_URL": cluster.url("s3"),
                # Not as variables, which Tune copies to where logs show them: docs/kubernetes.md.
                "AWS_SHARED_CREDENTIALS_FILE": f"{cluster.folder}/secrets/credentials",
                "PYTHONPATH": str(home),
                "MLFLOW_LOGGING_LEVEL": "DEBUG",
                "RAY_BACKEND_LOG_LEVEL": "debug",
                "RAY_worker_niceness": "0",
                "RAY_TMPDIR": str(ray),
            },
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:].decode()
        assert b"DEBUG" in done.stderr + done.stdout
        folder = Path(cluster.folder)
        theirs = [folder / "secrets", *folder.glob("s3/*.conf")]
        texts = {"stdout": done.stdout, "stderr": done.stderr}
        texts |= contents(home) | contents(folder, theirs) | contents(ray)
        names = "\n".join(texts)
        for part in ("/raylet.", "/s3/", "/postgres/", "/mlflow.log", "/worker-"):
            assert part in names
        assert leaks(canaries, contents(folder / "secrets"))  # it finds them
        assert leaks(canaries, texts) == {}
    storage.delete_folder(ray)
