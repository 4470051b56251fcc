"""Shards written by Ray tasks, and their progress."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data_prep.products import Written
from ivegan.errors import UserError
from pipelines.cluster.session import ray_session

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

    @ray.remote(num_cpus=1, scheduling_strategy="SPREAD")
    def write(job: Any) -> Written:
        return write_shard(job)

    with ray_session():
        try:
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
