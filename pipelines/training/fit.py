"""Train one plan, on Ray or in this process; the run's folder is its record."""

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ivegan import checkpoint, storage
from ivegan.config import config_hash, flatten, from_dict, to_dict
from ivegan.errors import UserError
from pipelines import record as records
from pipelines.background import repeated
from pipelines.claim import PATIENCE, claimed
from pipelines.cluster.session import (
    Terminated,
    answer_of,
    missing_nodes_logged,
    ray_session,
    require_resources,
    started,
    terminated_by_signal,
)
from pipelines.record import HOW, RATE, RunRecord
from pipelines.training.follow import Event, Follower, Measure, Show
from pipelines.training.plan import Plan, check_data, check_same_data, git_commit, sizes_of
from pipelines.training.ray_backend import fit_ray
from pipelines.training.worker import work

log = logging.getLogger(__name__)

GRACE = 20.0
"""Seconds after SIGTERM in which a run in this process reaches its next flush, to save there."""
LOOK = 1.0
"""Seconds between two looks at the folder of a run on Ray."""


def fit(plan: Plan, *, show: Show | None = None, measure: Measure | None = None) -> dict[str, Any]:
    """Train as planned and return what ``--json`` prints, as ``result_of`` does.

    Args:
        plan: from ``resolve``.
        show: called with every event, for a terminal; nothing is printed here.
        measure: called with every checkpoint's URI; its numbers become metrics of the run.

    Raises:
        UserError: the run id exists, the data do not fit or are no longer the same, or the cluster
            is too small.
        NonFiniteLossError: training diverged.
    """
    log_line = (lambda line: show({"line": line})) if show else log.info
    dataset_hash, resumed = check_data(plan), records.exists(plan.run_uri)
    if resumed:
        check_resumable(plan, dataset_hash)
    asked = started(functools.partial(_open_tracking, plan, resumed))
    with contextlib.ExitStack() as stack:
        patience = PATIENCE if plan.run.resume else 0.0
        lost = stack.enter_context(claimed(plan.run_uri, patience, log_line))
        sizes, each = sizes_of(plan.config, plan.run), plan.run.worker_resources
        room = functools.partial(require_resources, sizes, each, plan.run.wait_for_nodes, log_line)
        if plan.run.workers:  # Ray starts while MLflow is asked
            stack.enter_context(ray_session())
            plan = plan.of_size(room())
            stack.enter_context(missing_nodes_logged(sizes[-1], each, log_line))
        record = new_record(plan, dataset_hash)
        answer_of(asked)
        asked_to_end = stack.enter_context(terminated_by_signal(0 if plan.run.workers else GRACE))
        stack.enter_context(recorded(plan.run_uri, record, plan.tracking_uri, lost))
        follower = Follower(plan, show, measure)
        # What a checkpoint's config.json holds beside the configuration.
        names = ("preset", "run_id", "data", "dataset_hash", "config_hash", "git_commit")
        metadata = {name: getattr(record, name) for name in (*names, "threads", "versions", *HOW)}
        metadata["skip_bad"] = plan.run.skip_bad
        if plan.run.workers:
            with repeated(follower.look, LOOK, "progress", last=True):
                fit_ray(plan, metadata, record.key, room if len(sizes) > 1 else None)
        else:

            def flushed(event: Event, leaves: bool) -> None:
                follower.pass_on(event)
                if leaves:
                    raise Terminated

            work(plan, metadata, flushed, asked_to_end)
    with storage.longer_retries():
        return result_of(plan.run_uri)


def result_of(run_uri: str) -> dict[str, Any]:
    """Return the result of a run with a checkpoint: ids, checkpoint, rate and last metrics.

    The rate, in images per second, is the one of the whole run without its first flush.
    """
    from pipelines.tracking.mirror import run_id_of

    last, points = checkpoint.checkpoints(run_uri)[-1], records.points_with(run_uri, RATE)
    metadata = checkpoint.read_metadata(last)
    metrics = points[-1].metrics if points else {RATE: 0.0}
    rate = metrics[RATE]
    if len(points) > 1:  # the first holds warm-up
        start, end = points[0].images_seen, points[-1].images_seen
        rate = (end - start) / records.training_seconds(points[1:], start)
    of_machine = ("system/", "alarm/")
    return {
        "run_id": records.read_record(run_uri).run_id,
        "mlflow_run_id": run_id_of(run_uri),
        "checkpoint": last,
        "images_seen": metadata["images_seen"],
        "images_per_second": round(rate, 1),
        "world_size": metadata["world_size"],
        "metrics": {k: v for k, v in metrics.items() if not k.startswith(of_machine)},
    }


@contextlib.contextmanager
def recorded(
    run_uri: str, record: RunRecord, tracking_uri: str, lost: threading.Event
) -> Iterator[None]:
    """Write a run's record, mirror it while the block runs, and write how the block ended."""
    from pipelines.tracking.mirror import mirrored

    records.write_record(run_uri, record)
    status = "FAILED"
    with mirrored(run_uri, tracking_uri):
        try:
            yield
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit, Terminated):
            status = "KILLED"
            raise
        finally:
            if not lost.is_set():
                records.end_record(run_uri, status)


def _open_tracking(plan: Plan, resumed: bool) -> None:
    """Import MLflow, which takes seconds, and check that its store takes the run.

    A resumed run does not need it at once, and of a sweep's trials the sweep has checked.
    """
    import pipelines.tracking.mirror  # noqa: F401
    from pipelines.tracking import client

    if plan.run.parent_run is None:
        try:
            client.check(plan.tracking_uri, plan.experiment)
        except storage.Unavailable:
            if not resumed:
                raise


def new_record(plan: Plan, dataset_hash: str, **own: Any) -> RunRecord:
    """Return the record of a run that starts; key, start and parent stay those of its first."""
    run = plan.run
    common: dict[str, Any] = {
        "run_id": plan.run_id,
        "preset": plan.preset,
        "config": to_dict(plan.config),
        **{name: getattr(run, name) for name in HOW},
        "threads": run.threads,
        "world_size": max(1, run.workers),
        "data": plan.data_uri,
        "dataset_hash": dataset_hash,
        "config_hash": config_hash(plan.config),
        "git_commit": git_commit(),
        "parent": run.parent_run,
        "experiment": plan.experiment,
        "tags": plan.tags,
        "params": {"workers": run.workers},
        "key": records.new_key(plan.run_id),
        "versions": {"torch": torch.__version__},
    }
    record = RunRecord(**common | own)
    if not records.exists(plan.run_uri):
        return record
    earlier = records.read_record(plan.run_uri)
    kept = {"started": earlier.started or record.started, "parent": record.parent or earlier.parent}
    return dataclasses.replace(record, key=earlier.key, **kept)


def check_resumable(plan: Plan, dataset_hash: str) -> None:
    """Check that an existing run may be continued, with equal settings and data.

    Raises:
        UserError: it may not.
    """
    if not plan.run.resume:
        raise UserError(
            f"The run id {plan.run_id} exists in {plan.run_uri}: add --resume to continue it, or "
            "choose another --run-id."
        )
    earlier = records.read_record(plan.run_uri)
    before, now = flatten(from_dict(earlier.config)), flatten(plan.config)
    for name in HOW:
        now[name], before[name] = getattr(plan.run, name), getattr(earlier, name)
    changed = [k for k in now if now[k] != before[k] and k != "total_images"]
    if changed:
        listed = ", ".join(f"{k} was {before[k]} and is {now[k]}" for k in changed)
        raise UserError(f"The run {plan.run_id} cannot be resumed with other settings: {listed}.")
    check_same_data(f"The run {plan.run_id}", plan, earlier.dataset_hash, dataset_hash)
