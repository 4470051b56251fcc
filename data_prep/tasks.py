"""Shards written by Ray tasks, and their progress."""

import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data_prep.products import Written
from ivegan import storage
from ivegan.errors import UserError

log = logging.getLogger(__name__)


def write_with_ray(
    write_shard: Callable[[Any], Written], jobs: list[Any], workers: int
) -> Iterator[Written]:
    """Yield the shards as Ray tasks finish them, so many at a time.

    Raises:
        UserError: an error that a task found in the source or the destination.
    """
    import ray
    from ray.exceptions import RayTaskError

    started = not ray.is_initialized()
    if started:
        # Without RAY_ADDRESS, a local cluster is started for this build.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        attach = bool(os.environ.get("RAY_ADDRESS"))
        _check_ray_address()
        ray.init(
            address=None if attach else "local",
            num_cpus=None if attach else workers,
            include_dashboard=None if attach else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    try:
        where = {"env_vars": storage.environment()}
        task = ray.remote(num_cpus=1, runtime_env=where, scheduling_strategy="SPREAD")(write_shard)
        waiting, running = list(reversed(jobs)), []
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(task.remote(waiting.pop()))
            done, running = ray.wait(running)
            yield ray.get(done[0])
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        if started:
            ray.shutdown()


def _check_ray_address() -> None:
    """Check that the host of RAY_ADDRESS answers: Ray would retry indefinitely."""
    address = os.environ.get("RAY_ADDRESS", "").removeprefix("ray://")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"No Ray cluster answers at RAY_ADDRESS {address} ({error}): correct or unset it."
            ) from error


def with_progress(written: Iterable[Written], jobs: list[Any]) -> Iterator[Written]:
    """Yield the shards, with a bar on a terminal and log lines elsewhere."""
    total = sum(job.stop - job.start for job in jobs)
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=" images", unit_scale=True, desc="build") as bar:
            for one in written:
                bar.update(one.shard.samples)
                yield one
        return
    began, images = time.perf_counter(), 0
    for done, one in enumerate(written, start=1):
        images += one.shard.samples
        if done * 10 // len(jobs) > (done - 1) * 10 // len(jobs):
            rate = images / (time.perf_counter() - began)
            log.info(
                "%d of %d shards, %.0f images/s, %.0f s left",
                done,
                len(jobs),
                rate,
                (total - images) / rate,
            )
        yield one
