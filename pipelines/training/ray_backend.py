"""Ray Train as the back end of a training: its ranks, their events and their failures."""

import contextlib
import os
import threading
from typing import Any

import psutil

from ivegan import storage
from ivegan.errors import UserError
from ivegan.step import NonFiniteLossError
from pipelines.cluster.session import in_a_thread, named, needs, threads, with_children
from pipelines.training.plan import Plan
from pipelines.training.worker import Emit, Event, work

_BEHIND = 19  # a seventieth of the weight of a worker: more than these processes need


def fit_ray(
    plan: Plan, facts: dict[str, Any], handle: Emit, *, older: set[int] | None
) -> dict[str, Any]:
    """Train with Ray's workers, passing their events on as they come.

    ``older`` are this process's threads that do not serve the run; None where Ray serves others.
    """
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.config import LoggingConfig
    from ray.util.queue import Queue

    from pipelines.training.trainer import Trainer

    def hear(event: Event) -> None:
        nonlocal older
        if older is not None:  # the first event: the workers are there, with their own priority
            _give_way(older)
            older = None
        handle(event)

    queue = Queue(actor_options={"num_cpus": 0})
    failures: list[Exception] = []
    listener = threading.Thread(target=_listen, args=(queue, hear, failures), daemon=True)
    listener.start()
    filesystem, path = storage.filesystem(storage.join(plan.run_uri, "ray"))
    trainer = Trainer(
        _ray_worker,
        alone=older is not None,
        train_loop_config={"plan": plan, "facts": facts, "events": queue.actor},
        scaling_config=ScalingConfig(
            num_workers=plan.run.workers,
            use_gpu=plan.run.gpu,
            resources_per_worker=needs(plan.run),
        ),
        run_config=RunConfig(
            name=plan.run_id,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=3),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = in_a_thread(trainer.fit)
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    finally:
        queue.put(None)
        listener.join()
        queue.shutdown(force=True)
    if failures:
        raise failures[0]
    outcome = result.return_value
    assert isinstance(outcome, dict), "rank 0 returns the outcome"
    if "diverged" in outcome:
        raise NonFiniteLossError(outcome["diverged"])
    return outcome


def _give_way(older: set[int]) -> None:
    """Lower the priority of all that serves a run but its workers: processes, and threads here.

    Ranks wait for each other at every step, so whatever takes a core from one of them holds up all.
    Behind them, it takes the moments in which they wait.

    Args:
        older: threads of this process that do not serve the run.
    """
    me = psutil.Process()
    # Workers inherit the raylet's, also one that takes a dead one's place.
    kept = named("raylet") | with_children(named("ray::RayTrainWorker"))
    for process in {me, *me.children(recursive=True)} - kept:
        for thread in threads(process) - older:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.setpriority(os.PRIO_PROCESS, thread, _BEHIND)


def _listen(queue: Any, handle: Emit, failures: list[Exception]) -> None:
    """Handle events until None comes; after the first failure, which is noted, only take them."""
    while (event := queue.get()) is not None:
        if not failures:
            try:
                handle(event)
            except Exception as error:  # of any kind: the driver raises it when the workers end
                failures.append(error)


def _cause(error: Exception) -> Exception:
    """Return the user's mistake behind a failed training, or the failure itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return UserError(str(cause))
            cause = cause.__cause__
    return error


def _ray_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train on one of Ray's ranks; only rank 0's events and outcome are used."""
    import ray
    import ray.train

    events = payload["events"]
    rank = ray.train.get_context().get_world_rank()
    last: list[Any] = []

    def emit(event: Event) -> None:
        if rank == 0:
            # Not awaited: a slow driver must not hold a step up. Nor Ray Train's own report, which
            # holds every rank up until its controller looks next, 2 s later.
            last[:] = [events.put_nowait.remote(event)]

    try:
        outcome = work(payload["plan"], payload["facts"], emit)
    except NonFiniteLossError as error:
        # Returned, not raised: every retry would diverge again.
        outcome = {"diverged": str(error)}
    ray.get(last)  # the queue holds all events now, before the driver closes it
    return outcome
