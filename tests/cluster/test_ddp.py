"""Training on Ray: two workers compute what one process does, and outlive a killed one."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.train import WorkerGroupError
from safetensors.torch import load_file

from data_prep.building import build
from ivegan import checkpoint, storage
from ivegan.config import override, preset
from ivegan.errors import UserError
from pipelines.cluster.session import ray_session
from pipelines.training import ray_backend
from pipelines.training.fit import fit
from pipelines.training.plan import Plan, Run, Workers, resolve


def weights_of(result: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(result["checkpoint"]) / "weights.safetensors")


def test_a_ray_of_its_own_leaves_no_process_behind(home):
    """Not even a worker that does not end when it should, as now and then one of Ray's."""
    script = """
        import atexit, os, threading
        from pipelines.cluster.session import ray_session

        class Stuck:
            def begin(self):
                atexit.register(threading.Event().wait)
                return os.getpid()

        with ray_session():
            import ray

            actor = ray.remote(Stuck).remote()
            worker = ray.get(actor.begin.remote())
            del actor
        print(worker)
    """
    words = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, check=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(done.stdout)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("attached", "error", "sentence"),
    [
        (False, Exception("It timed out."), "Ray did not start .*timed out.*--workers 0"),
        (True, ConnectionError("No answer"), "No answer: .* RAY_AUTH_TOKEN .* of the cluster"),
    ],
)
def test_a_ray_that_does_not_let_in_is_a_sentence(home, attached, error, sentence, monkeypatch):
    def init(**_: Any) -> None:
        raise error

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as head:
        if attached:
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        with pytest.raises(UserError, match=sentence):
            ray_session().__enter__()


def test_two_ray_workers_follow_the_plain_loop(home, ray_cluster, ring):
    """Same data, same draws: only the order of additions differs."""
    images = 64 * 40
    _, plain = ring(images=images)("plain")
    result, two = ring(workers=2, images=images)("two")
    assert result["world_size"] == 2
    assert len(two) == len(plain) == 40
    for a, b in zip(plain, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_shards_and_checkpoints_live_in_a_bucket(s3, home, store, ray_cluster):
    """Built to S3, trained from there by two Ray workers, resumed and read back from there."""
    build("digits", source=None, out=f"{s3}/digits", workers=0)
    sizes: dict[str, Any] = {"batch_size": 16, "model.width": 0.25}
    places: dict[str, Any] = {"data": f"{s3}/digits", "storage": f"{s3}/runs", "run_id": "far"}
    for workers, images in ((2, 16 * 8), (0, 16 * 12)):
        config = override(preset("digits"), {**sizes, "total_images": images})
        run = Run(workers=workers, resume=True, save_every=16 * 4, **places)
        result = fit(resolve("digits", config, run))
        assert result["images_seen"] == images
    kept = [uri.rpartition("-")[2] for uri in checkpoint.checkpoints(f"{s3}/runs/far")]
    assert [int(seen) for seen in kept] == [64, 128, 192]
    assert result["checkpoint"] == checkpoint.find(f"{s3}/runs/far")
    _, encoder, _, metadata = checkpoint.load_networks(result["checkpoint"])
    assert metadata["data"] == f"{s3}/digits"
    assert encoder(torch.rand(2, 1, 16, 16)).isfinite().all()


@pytest.mark.slow
def test_an_elastic_run_takes_the_workers_that_find_room(home, ray_cluster, ring):
    """Of four, two and one, which divide the batch: two, and one when each wants both CPUs."""
    elastic = Workers.parse(["1:4"])
    _, plain = ring()("plain")
    result, _ = ring(workers=elastic, images=64 * 10)("a")
    assert result["world_size"] == 2
    assert checkpoint.read_metadata(result["checkpoint"])["world_size"] == 2
    result, losses = ring(workers=elastic)("a", resume=True, threads=2)
    assert result["world_size"] == 1
    assert len(losses) == len(plain) == 20
    for a, b in zip(plain, losses, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("room", "ends", "tried"),
    [(lambda: 1, 2, [2, 1]), (lambda: 1, 9, [2, 1, 1, 1]), (None, 2, [2, 2]), (None, 9, [2] * 4)],
)
def test_a_run_continues_with_the_workers_that_find_room(home, room, ends, tried, monkeypatch):
    sizes: list[int] = []

    def fit_with(plan: Plan, *_: Any, elastic: bool) -> None:
        sizes.append(plan.run.workers)
        if len(sizes) == ends:
            return
        raise WorkerGroupError("a node was lost", {1: RuntimeError("lost")})

    monkeypatch.setattr(ray_backend, "_fit", fit_with)
    plan = resolve("ring", preset("ring"), Run(workers=2))
    with contextlib.nullcontext() if ends == 2 else pytest.raises(WorkerGroupError):
        ray_backend.fit_ray(plan, {}, "", room)
    assert sizes == tried  # three failures without a new checkpoint end it


def test_an_outage_in_a_worker_is_one_of_the_driver():
    error = WorkerGroupError("workers failed", {0: storage.Unavailable("The store is away.")})
    assert isinstance(ray_backend._cause(error), storage.Unavailable)


@pytest.mark.slow
def test_two_ray_workers_stream_what_one_process_streams(small_digits, ray_cluster):
    _, plain = small_digits("plain", workers=0, stream=True, loaders=0)
    result, two = small_digits("two", workers=2, stream=True, loaders=1)
    assert result["world_size"] == 2
    assert two == pytest.approx(plain, rel=1e-3, abs=1e-3)
    _, cached = small_digits("cached", workers=0)
    assert cached != pytest.approx(plain, rel=1e-3, abs=1e-3)  # another order of the samples


def test_asking_for_more_than_the_cluster_has_is_a_sentence(home, ray_cluster, ring):
    with pytest.raises(UserError, match=r"64 workers of 1 CPU each.*room for 2"):
        ring(workers=64, batch_size=128)("big")


@pytest.mark.slow
def test_a_killed_ray_worker_costs_nothing_but_time(home, ray_cluster, ring):
    """One of two workers gets SIGKILL at the first checkpoint; the run ends as if it had not."""
    cadence: dict[str, Any] = {"log_every": 64 * 500, "save_every": 64 * 500}
    start = ring(workers=2, images=64 * 4000)
    unbroken, _ = start("unbroken", **cadence)
    killed: list[int] = []

    def kill_once(event):
        if event.get("checkpoint") and not killed:
            worker = next(
                p
                for p in psutil.process_iter(["name", "cmdline"])
                if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])
            )
            worker.kill()
            killed.append(event["images_seen"])

    result, _ = start("killed", show=kill_once, **cadence)
    assert killed
    assert killed[0] < result["images_seen"] == 64 * 4000
    torch.testing.assert_close(weights_of(unbroken), weights_of(result), rtol=0, atol=0)
