"""Build, cache and stream come right, whatever happens to the store, the disk or the process."""

import itertools
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import local_cluster
import numpy as np
import pytest
import torch
from datasets import files_of
from fault_proxy import Fault, FaultProxy, Request
from local_cluster import Cluster
from processes import program, wait_for
from servers import s3_server, s3_variables

from data_prep.building import build
from data_prep.verify import verify
from ivegan import storage
from ivegan.config import override, preset
from ivegan.data.cache import load_split
from ivegan.data.manifest import read_manifest
from ivegan.data.stream import Stream
from ivegan.storage import objects

CONFIG = override(preset("digits"), {"batch_size": 16})


def remote_files(uri: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(f"{uri}/{name}") for name in storage.list_files(uri)}


def streamed(uri: str, steps: int) -> torch.Tensor:
    manifest = read_manifest(uri)
    stream = Stream(data_uri=uri, manifest=manifest, split="train", loaders=0)
    return torch.cat(list(itertools.islice(stream.batches(CONFIG, 0, 0, 1), steps)))


def now_and_then() -> Callable[[Request], Fault | None]:
    """Return a plan that does to some requests what can be done to them, in turn."""
    anything = [Fault(refuse="SlowDown"), Fault(drop=True)]
    reads = [Fault(cut_answer=10_000), Fault(corrupt_answer=20_000), *anything]
    writes = [Fault(corrupt_request=20_000), *anything]
    turns = {
        kind: itertools.cycle([fault for some in faults for fault in (*[None] * pause, some)])
        for kind, faults, pause in (("GET", reads, 15), ("PUT", writes, 2), ("", anything, 9))
    }
    lock = threading.Lock()

    def plan(request: Request) -> Fault | None:
        large = request.method == "PUT" and len(request.body) > 20_000
        kind = request.method if large or ".tar" in request.path else ""
        with lock:
            return next(turns.get(kind, turns[""]))

    return plan


def test_a_bad_network_changes_nothing(s3, s3_variables, tmp_path, monkeypatch):
    """Errors, cuts and wrong bytes, all through a build and two ways of reading."""
    build("digits", None, str(tmp_path / "good"), shard_size=100)
    expected = files_of(tmp_path / "good")
    uri = f"{s3}/set"
    with FaultProxy(s3_variables["AWS_ENDPOINT_URL"], now_and_then()) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        build("digits", None, uri, shard_size=100)
        written = set(proxy.injected)
        assert build("digits", None, uri, shard_size=100)["skipped"] == 19
        assert verify(uri) == []
        cached = load_split(uri, "train", tmp_path / "cache")
        np.testing.assert_array_equal(
            cached.images, load_split(str(tmp_path / "good"), "train", tmp_path / "c2").images
        )
        assert torch.equal(streamed(uri, 100), streamed(str(tmp_path / "good"), 100))
        monkeypatch.undo()
        assert remote_files(uri) == expected
    assert {"refuse", "drop", "corrupt_request"} <= written
    assert {"cut_answer", "corrupt_answer"} <= set(proxy.injected)


@pytest.fixture
def killable(tmp_path, monkeypatch) -> Iterator[Cluster]:
    """Return an S3 server of the test's own, with the environment set to reach a bucket in it."""
    (tmp_path / "store").mkdir()
    with s3_server(tmp_path / "store") as cluster:
        for name, value in s3_variables(cluster).items():
            monkeypatch.setenv(name, value)
        storage.s3_client().create_bucket(Bucket="bucket")
        yield cluster


def test_a_stream_waits_for_a_store_that_is_killed(killable, tmp_path, monkeypatch):
    expected_uri, uri = str(tmp_path / "good"), "s3://bucket/set"
    for where in (expected_uri, uri):
        build("digits", None, where, shard_size=100)
    warnings: list[tuple[object, ...]] = []

    def back(*message: object) -> None:
        warnings.append(message)
        if message is warnings[0]:  # not by their number: several threads wait
            local_cluster.start_s3(killable)

    monkeypatch.setattr(objects.log, "warning", back)
    stream = Stream(data_uri=uri, manifest=read_manifest(uri), split="train", loaders=0)
    with storage.longer_retries():
        batches = stream.batches(CONFIG, 0, 0, 1)
        first = list(itertools.islice(batches, 10))
        local_cluster.end(killable, "s3", kill=True)
        rest = list(itertools.islice(batches, 140))
    assert warnings
    assert torch.equal(torch.cat(first + rest), streamed(expected_uri, 150))


def started(folder: Path, *words: str) -> tuple[subprocess.Popen[bytes], Path]:
    """Start the command that builds; return its process and its log."""
    with (log := folder / "log").open("w") as into:
        command = program("build.py", *words)
        return subprocess.Popen(command, stdout=into, stderr=subprocess.STDOUT, cwd=folder), log


def test_ray_tasks_wait_for_a_store_that_is_killed(killable, tmp_path):
    """The command, two workers; the store gets SIGKILL after the first shards."""
    words = ["digits", "--out", "s3://bucket/set", "--workers", "2", "--shard-size", "20"]
    process, log = started(tmp_path, *words)
    wait_for(lambda: len(storage.list_names("s3://bucket/set/train")) > 2, process, log)
    local_cluster.end(killable, "s3", kill=True)
    local_cluster.start_s3(killable)
    assert process.wait(240) == 0, log.read_text()
    build("digits", None, str(tmp_path / "good"), shard_size=20)
    assert remote_files("s3://bucket/set") == files_of(tmp_path / "good")


def test_a_killed_build_redoes_only_what_is_missing(tmp_path):
    """SIGKILL to the command, in the middle."""
    out = tmp_path / "set"
    words = ["digits", "--out", str(out), "--workers", "0", "--shard-size", "1"]
    process, log = started(tmp_path, *words)
    wait_for(lambda: len(storage.list_names(out / ".unfinished")) > 50, process, log)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    result = build("digits", None, str(out), shard_size=1)
    assert 49 <= result["skipped"] < 1797
    assert result["shards"] == 1797
    assert verify(str(out)) == []


def limited() -> None:
    """Let no file grow beyond 100,000 bytes, as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_disk_without_room_ends_a_build_in_a_sentence(tmp_path):
    command = program("build.py", "digits", "--out", str(tmp_path / "set"), "--workers", "0")
    done = subprocess.run(
        command, preexec_fn=limited, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "train/shard-00000.tar grows larger than files may be here: choose another place."
    )
    assert "Traceback" not in done.stderr
    assert set(files_of(tmp_path / "set")) == {".unfinished/plan.json"}
    assert build("digits", None, str(tmp_path / "set"))["skipped"] == 0
