"""Shards written by Ray tasks, and their progress."""

import logging
import os
import socket
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
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if os.environ.get("RAY_ADDRESS"):
            _check_ray_address()
            ray.init(**quiet)
        else:  # a local cluster for this build
            ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
    try:
        where = {"env_vars": storage.environment()}

        @ray.remote(num_cpus=1, runtime_env=where, scheduling_strategy="SPREAD")
        def write(job: Any) -> Written:
            return write_shard(job)

        waiting, running = list(reversed(jobs)), []
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(write.remote(waiting.pop()))
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
    address = os.environ["RAY_ADDRESS"].removeprefix("ray://")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"No Ray cluster answers at RAY_ADDRESS {address} ({error}): correct or unset it."
            ) from error


def with_progress(written: Iterable[Written], shards: int, images: int) -> Iterator[Written]:
    """Yield the shards, and log a line at each tenth of them."""
    began, seen = time.perf_counter(), 0
    for done, one in enumerate(written, start=1):
        seen += one.shard.samples
        if done * 10 // shards > (done - 1) * 10 // shards:
            rate = seen / (time.perf_counter() - began)
            left = (images - seen) / rate
            log.info("%d of %d shards, %.0f images/s, %.0f s left", done, shards, rate, left)
        yield one
