"""The whole way through the cluster that ``local_cluster.py`` starts, by ``ray job submit``.

    python infra/local_demo.py

Shards of digits (of MNIST, where IVEGAN_TEST_DATA has it), a run on two nodes, a sweep, an
evaluation, both models registered and promoted, and one of them pulled. All state is in S3 and the
database. It ends with the run that is in production.
"""

import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

from local_cluster import BUCKET, ROOT, Cluster, ask_ray, environment_of, program, read


def submit(cluster: Cluster, *words: str, flags: tuple[str, ...] = (), wait: bool = True) -> str:
    """Run ``ray job submit`` with this repository, as a person does, and return the job's name."""
    name = f"demo-{secrets.token_hex(4)}"
    where = ["--working-dir", str(ROOT), "--submission-id", name, *([] if wait else ["--no-wait"])]
    command = [program("ray"), "job", "submit", *where, *flags, "--", "python", *words]
    done = subprocess.run(command, env=environment_of(cluster), check=False)
    if done.returncode:
        raise SystemExit(f"The job {name} failed: {' '.join(words)}")
    if wait:
        finish(cluster, name)
    return name


def finish(cluster: Cluster, name: str) -> None:
    """Return once a job succeeded; the tail of its log may end before the job does."""
    while (status := ask_ray(cluster, f"/api/jobs/{name}")["status"]) in ("PENDING", "RUNNING"):
        time.sleep(1)  # between two looks
    if status != "SUCCEEDED":
        raise SystemExit(f"The job {name} ended as {status}: see `ray job logs {name}`.")


def demo(cluster: Cluster) -> None:
    """Go the whole way by ``ray job submit``, with all state in S3 and the database."""
    source = os.environ.get("IVEGAN_TEST_DATA")
    preset, raw = ("mnist", f"{source}/mnist") if source else ("digits", None)
    data, runs = f"s3://{BUCKET}/data/{preset}", f"s3://{BUCKET}/runs"
    places = [preset, "--data", data, "--storage", runs, "--model.width", "0.25"]
    run = f"demo-{secrets.token_hex(3)}"
    on_a_node = ("--entrypoint-num-cpus", "1")  # what computes in the driver leaves the head alone
    build = ["data_prep/build.py", preset, "--out", data, *(["--source", raw] if raw else [])]
    submit(cluster, *build)
    submit(cluster, "pipelines/train.py", *places, "--run-id", run, "--total-images", "12800")
    sweep = ["--sweep-id", f"{run}-sweep", "--samples", "2", "--scores", "2"]
    sweep += ["--score-images", "200", "--total-images", "3200"]
    submit(cluster, "pipelines/tune.py", *places, *sweep)
    out = f"s3://{BUCKET}/reports/{run}"
    submit(cluster, "pipelines/evaluate.py", f"{runs}/{run}", "--out", out, flags=on_a_node)
    submit(cluster, "pipelines/registry.py", "register", f"{runs}/{run}", flags=on_a_node)
    promote = ["pipelines/registry.py", "promote", preset, "--force", "a demonstration"]
    submit(cluster, *promote, flags=on_a_node)
    # The team that uses the model has an account of MLflow, and neither Ray nor keys of S3.
    pulled = Path(cluster.folder) / "pulled"
    words = ["pull", f"ivegan-{preset}-encoder", "--stage", "production", "--to", str(pulled)]
    environment = {k: v for k, v in environment_of(cluster).items() if not k.startswith("AWS_")}
    pull = [sys.executable, ROOT / "pipelines" / "registry.py", *words]
    subprocess.run(pull, env=environment, check=True)
    print(f"\nThe demo passed: {run} is in production. MLflow: {cluster.url('mlflow')}")


if __name__ == "__main__":
    demo(read())
