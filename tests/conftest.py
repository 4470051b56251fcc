"""Fixtures for several test files: real data, a real S3 server, one Ray, MLflow stores."""

import os

# Before torch is imported: threads of several test processes on few cores spend most of their time
# waiting for each other. Commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from datasets import write_faces, write_idx
from mlflow import MlflowClient
from mlflow.entities import Run
from servers import s3_server
from servers import s3_variables as variables_of

from ivegan import storage
from pipelines.cluster.session import this_python

# Ray's workers have the nice value 15: they would wait for all other tests.
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of ``faults/`` as slow, and keep those that share a Ray on one worker."""
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.slow)
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Return the folder with the real ``mnist/`` and ``celeba/``, or skip."""
    where = os.environ.get("IVEGAN_TEST_DATA")
    if not where:
        pytest.skip("set IVEGAN_TEST_DATA to a folder with mnist/ and celeba/")
    return Path(where)


@pytest.fixture(scope="session")
def digits_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of the digits, built once; a test that spoils data copies it first."""
    from data_prep.building import build

    out = tmp_path_factory.mktemp("digits") / "shards"
    build("digits", None, str(out), workers=0)
    return str(out)


@pytest.fixture
def digits_copy(digits_dataset: str, tmp_path: Path) -> Path:
    """Return a copy of the digits that a test may spoil."""
    return Path(shutil.copytree(digits_dataset, tmp_path / "digits"))


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Return a folder in MNIST's layout with 24 + 10 images, half of the files gzipped."""
    return write_idx(tmp_path / "raw", train=24, test=10, packed=True)


@pytest.fixture
def face_folder(tmp_path: Path) -> Path:
    """Return a folder in CelebA's layout with 5 + 3 + 2 images in a zip."""
    return write_faces(tmp_path / "faces")


@pytest.fixture(scope="session")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run one local Ray for all tests that want it; its nodes have the test store's credentials."""
    import ray

    with pytest.MonkeyPatch.context() as environment:
        for name, value in request.getfixturevalue("s3_variables").items():
            environment.setenv(name, value)
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env=this_python(),
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the variables that lead to a real S3 server."""
    with s3_server(tmp_path_factory.mktemp("s3")) as cluster:
        yield variables_of(cluster)


@pytest.fixture
def s3(s3_variables: dict[str, str]) -> Iterator[str]:
    """Return an empty ``s3://bucket`` for one test, with the environment set to reach it."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        for name, value in s3_variables.items():
            environment.setenv(name, value)
        bucket = f"ivegan-test-{uuid.uuid4().hex}"
        storage.s3_client().create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fresh SQLite store: MLflow takes seconds to make its tables, a copy takes none."""
    from pipelines.tracking import client as tracking

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking.client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder to work in, with no variable of ours set."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "IVEGAN_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(home: Path, empty_store: Path) -> str:
    """Return the URI of a fresh MLflow store, where commands that run in ``home`` look for it."""
    (home / "runs").mkdir()
    shutil.copy(empty_store, home / "runs" / "mlflow.db")
    return f"sqlite:///{home}/runs/mlflow.db"


@pytest.fixture
def mlflow_runs() -> Callable[[str], list[Run]]:
    """Return a function that returns all runs of a store, newest first."""

    def runs(uri: str) -> list[Run]:
        client = MlflowClient(uri)
        return client.search_runs([e.experiment_id for e in client.search_experiments()])

    return runs
