"""Train one plan, on Ray or in this process; the run's folder is its record."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ivegan.config import config_hash, flatten, from_dict, to_dict
from ivegan.errors import UserError, public
from pipelines import record as records
from pipelines.claim import PATIENCE, Ownership, claimed
from pipelines.cluster.session import (
    Terminated,
    answer_of,
    missing_nodes_logged,
    ray_session,
    require_resources,
    started,
    terminated_by_signal,
)
from pipelines.record import RunRecord
from pipelines.training.follow import Follower, Measure, Show, following
from pipelines.training.plan import Plan, check_data, check_same_data, git_commit
from pipelines.training.ray_backend import fit_ray
from pipelines.training.worker import work

if TYPE_CHECKING:  # it brings MLflow, which takes seconds to import
    from pipelines.tracking.mirror import Mirror

log = logging.getLogger(__name__)

# Names in run.json of the options that numbers depend on, and their names as options.
HOW = {
    "stream": "stream",
    "precision": "precision",
    "micro_batches": "accumulate",
    "compile": "compile",
}


def fit(plan: Plan, *, show: Show | None = None, measure: Measure | None = None) -> dict[str, Any]:
    """Train as planned and return what ``--json`` prints: ids, checkpoint, rate, last metrics.

    Args:
        plan: from ``resolve``.
        show: called with every event, for a terminal; nothing is printed here.
        measure: called with every checkpoint's URI; its numbers become metrics of the run.

    Raises:
        UserError: the run id exists, the data do not fit or are no longer the same, or the cluster
            is too small.
        NonFiniteLossError: training diverged.
    """
    dataset_hash = check_data(plan)
    _record(plan, dataset_hash)  # says early what is wrong
    log_line = (lambda line: show({"line": line})) if show else log.info
    first = not records.exists(plan.run_uri) and plan.run.parent_run is None
    asked = started(_check_tracking if first else _import_mlflow, plan)
    with contextlib.ExitStack() as stack:
        patience = PATIENCE if plan.run.resume else 0.0
        ownership = stack.enter_context(claimed(plan.run_uri, patience, log_line))
        record = _record(plan, dataset_hash)
        if plan.run.workers:  # Ray starts while MLflow is asked
            stack.enter_context(ray_session())
            each = plan.run.worker_resources
            require_resources(plan.run.workers, each, plan.run.wait_for_nodes, log_line)
            stack.enter_context(missing_nodes_logged(plan.run.workers, each, log_line))
        answer_of(asked)
        stack.enter_context(terminated_by_signal())
        mirror = stack.enter_context(recorded(plan.run_uri, record, plan.tracking_uri, ownership))
        follower = Follower(plan, show, measure)
        metadata = _metadata(plan, record)
        if plan.run.workers:
            with following(follower):
                result = fit_ray(plan, metadata)
        else:
            result = work(plan, metadata, follower.look)
            follower.look()
    return {"run_id": plan.run_id, "mlflow_run_id": mirror.run_id or record.key, **result}


@contextlib.contextmanager
def recorded(
    run_uri: str, record: RunRecord, tracking_uri: str, ownership: Ownership
) -> Iterator["Mirror"]:
    """Write a run's record, mirror it while the block runs, and write how the block ended."""
    from pipelines.tracking.mirror import Mirror

    records.write_record(run_uri, record)
    mirror = Mirror(run_uri, tracking_uri)
    status = "FAILED"
    try:
        yield mirror
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, Terminated):
        status = "KILLED"
        raise
    finally:
        try:
            if not ownership.lost:
                records.end_record(run_uri, status)
        finally:
            mirror.close()


def _import_mlflow(plan: Plan) -> None:
    import pipelines.tracking.mirror  # noqa: F401


def _check_tracking(plan: Plan) -> None:
    """Raise UserError if the tracking store does not answer, or does not take the run."""
    from pipelines.tracking import client  # here, since it takes seconds to import

    client.check(plan.tracking_uri, plan.experiment)


def _record(plan: Plan, dataset_hash: str) -> RunRecord:
    """Return the record of a run that starts now, for the first time or again."""
    run = plan.run
    record = RunRecord(
        run_id=plan.run_id,
        preset=plan.preset,
        config=to_dict(plan.config),
        **{name: getattr(run, option) for name, option in HOW.items()},
        threads=run.threads,
        world_size=max(1, run.workers),
        data=plan.data_uri,
        dataset_hash=dataset_hash,
        config_hash=config_hash(plan.config),
        git_commit=git_commit(),
        parent=run.parent_run,
        experiment=plan.experiment,
        tags=plan.tags,
        params={"workers": run.workers},
        key=records.new_key(plan.run_id),
        versions={"torch": torch.__version__},
    )
    if not records.exists(plan.run_uri):
        return record
    earlier = records.read_record(plan.run_uri)
    _check_resumable(plan, earlier, dataset_hash)
    return dataclasses.replace(
        record,
        key=earlier.key,
        started=earlier.started or record.started,
        parent=record.parent or earlier.parent,
    )


def _check_resumable(plan: Plan, earlier: RunRecord, dataset_hash: str) -> None:
    """Check that a run may be continued.

    Raises:
        UserError: ``--resume`` is not given, or settings or data are not the same.
    """
    if not plan.run.resume:
        raise UserError(
            f"The run id {plan.run_id} exists in {plan.run_uri}: add --resume to continue it, or "
            "choose another --run-id."
        )
    before, now = flatten(from_dict(earlier.config)), flatten(plan.config)
    for name, option in HOW.items():
        now[option], before[option] = getattr(plan.run, option), getattr(earlier, name)
    changed = [k for k in now if now[k] != before[k] and k != "total_images"]
    if changed:
        listed = ", ".join(f"{k} was {before[k]} and is {now[k]}" for k in changed)
        raise UserError(f"The run {plan.run_id} cannot be resumed with other settings: {listed}.")
    check_same_data(f"The run {plan.run_id}", plan, earlier.dataset_hash, dataset_hash)


def _metadata(plan: Plan, record: RunRecord) -> dict[str, Any]:
    """Return what a checkpoint's ``config.json`` holds beside the configuration."""
    names = ["preset", "run_id", "data", "dataset_hash", "config_hash", "git_commit", "world_size"]
    names += ["threads", "versions", *HOW]
    return {name: getattr(record, name) for name in names} | {
        "run_key": record.key,
        "mlflow_run_id": record.key,
        "tracking_uri": public(plan.tracking_uri),
    }
