"""Fixtures for several test files: real data, a real S3 server, one Ray, MLflow stores."""

import os

# Before torch is imported: threads of several test processes on few cores spend most of their time
# waiting for each other. Commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gzip
import importlib.util
import io
import shutil
import struct
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fault_proxy import KillableStore
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from data_prep import celeba
from ivegan import storage

RNG = np.random.default_rng(0)
# Ray's workers have the nice value 15: they would wait for all other tests.
os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of ``faults/`` as slow, and keep those of ``cluster/`` on one worker.

    A worker of pytest-xdist that has them starts one Ray for all.
    """
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.slow)
        if "cluster" in item.path.parts:
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
def idx_folder(tmp_path: Path) -> Path:
    """Return a folder in MNIST's layout with 24 + 10 images, half of the files gzipped."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for half, count in (("train", 24), ("t10k", 10)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{half}-images-idx3-ubyte.gz").write_bytes(gzip.compress(_idx(images)))
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(_idx(labels))
    return folder


def _idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def faces() -> Callable[..., Path]:
    """Return a function that writes a folder in CelebA's layout, of random images."""

    def write(
        folder: Path, counts: tuple[int, int, int] = (5, 3, 2), size: tuple[int, int] = (178, 218)
    ) -> Path:
        folder.mkdir(parents=True)
        names = [f"{i + 1:06d}.jpg" for i in range(sum(counts))]
        with zipfile.ZipFile(folder / celeba.ZIP, "w") as archive:
            archive.writestr("img_align_celeba/", b"")
            for name in names:
                jpeg = io.BytesIO()
                pixels = RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(jpeg, "jpeg")
                archive.writestr(f"img_align_celeba/{name}", jpeg.getvalue())
        attributes = [" ".join(f"Attribute_{i}" for i in range(40)) + " "]
        for number, name in enumerate(names):
            values = [1 if (number >> bit) & 1 else -1 for bit in range(40)]
            attributes.append(f"{name} " + " ".join(f"{value:2d}" for value in values))
        (folder / celeba.ATTRIBUTES).write_text("\n".join([str(len(names)), *attributes]) + "\n")
        parts = [part for part, count in enumerate(counts) for _ in range(count)]
        rows = [f"{name} {part}\n" for name, part in zip(names, parts, strict=True)]
        (folder / celeba.PARTITION).write_text("".join(rows))
        (folder / celeba.IDENTITY).write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)))
        return folder

    return write


@pytest.fixture
def face_folder(faces: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a folder in CelebA's layout with 5 + 3 + 2 images in a zip."""
    return faces(tmp_path / "faces")


@pytest.fixture(scope="session")
def ray_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run one local Ray for all tests that want it; its nodes have the test store's credentials."""
    import ray

    with pytest.MonkeyPatch.context() as environment:
        if importlib.util.find_spec("swift") or os.environ.get("S3_TEST_ENDPOINT"):
            for name, value in request.getfixturevalue("s3_variables").items():
                environment.setenv(name, value)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the variables that lead to a real S3 server.

    It is the one that S3_TEST_ENDPOINT, S3_TEST_ACCESS_KEY and S3_TEST_SECRET_KEY name, or Swift,
    started here.
    """
    if endpoint := os.environ.get("S3_TEST_ENDPOINT"):
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": os.environ["S3_TEST_ACCESS_KEY"],
            "AWS_SECRET_ACCESS_KEY": os.environ["S3_TEST_SECRET_KEY"],
            "AWS_DEFAULT_REGION": os.environ.get("S3_TEST_REGION", "us-east-1"),
        }
        return
    with KillableStore(tmp_path_factory.mktemp("s3")) as store:
        yield store.environment


@pytest.fixture
def s3(s3_variables: dict[str, str]) -> Iterator[str]:
    """Return an empty ``s3://bucket`` for one test, with the environment set to reach it."""
    with pytest.MonkeyPatch.context() as environment:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)
        for name, value in s3_variables.items():
            environment.setenv(name, value)
        client, bucket = storage.s3_client(), f"ivegan-test-{uuid.uuid4().hex}"
        client.create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"
        keys = [{"Key": name} for name in storage.list_files(f"s3://{bucket}")]
        for start in range(0, len(keys), 1000):
            batch = {"Objects": keys[start : start + 1000], "Quiet": True}
            client.delete_objects(Bucket=bucket, Delete=batch)
        client.delete_bucket(Bucket=bucket)


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
