"""Train one plan, on Ray or in this process, under an MLflow run that ends as the training does."""

import contextlib
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from ivegan import storage
from ivegan.config import config_hash, flatten, from_dict, to_dict
from ivegan.errors import UserError
from pipelines.cluster.session import (
    Terminated,
    answer_of,
    ray_session,
    require_resources,
    started,
    terminated_by_signal,
    threads,
)
from pipelines.training.plan import HOW, Plan, Run, check_data, check_same_data, git_commit
from pipelines.training.ray_backend import fit_ray
from pipelines.training.worker import Emit, Event, work

if TYPE_CHECKING:  # it brings MLflow, which takes seconds to import: the driver's business alone
    from pipelines.tracking import client as tracking

log = logging.getLogger(__name__)

Measure = Callable[[str], dict[str, float]]


def fit(plan: Plan, *, show: Emit | None = None, measure: Measure | None = None) -> dict[str, Any]:
    """Train as planned and return what ``--json`` prints: ids, checkpoint, rate, last metrics.

    Args:
        plan: from ``resolve``.
        show: called with every event, for a terminal; nothing is printed here.
        measure: called with every checkpoint's URI; what it returns is tracked with the losses.

    Raises:
        UserError: the run id exists, the data do not fit or are no longer the same, or the cluster
            is too small.
        NonFiniteLossError: training diverged.
    """
    dataset_hash = check_data(plan)
    known = _earlier_start(plan, dataset_hash)
    asked = None
    if known is None and plan.run.parent_run is None:  # nothing runs yet, so it is told at once
        asked = started(_check_tracking, plan)
    with contextlib.ExitStack() as stack:
        fit_somewhere = work
        if plan.run.workers:  # Ray starts while MLflow is asked
            older = threads(psutil.Process())
            alone = stack.enter_context(ray_session())
            require_resources(plan.run, (lambda line: show({"line": line})) if show else log.info)
            fit_somewhere = functools.partial(fit_ray, older=older if alone else None)
        if asked is not None:
            answer_of(asked)
        return _tracked(plan, dataset_hash, known, fit_somewhere, show, measure)


def _check_tracking(plan: Plan) -> None:
    """Raise UserError if the tracking store does not answer."""
    from pipelines.tracking import client as tracking  # here, since it takes seconds to import

    tracking.check(plan.tracking_uri)


def _tracked(
    plan: Plan,
    dataset_hash: str,
    known: dict[str, Any] | None,
    fit_somewhere: Callable[[Plan, dict[str, Any], Emit], dict[str, Any]],
    show: Emit | None,
    measure: Measure | None,
) -> dict[str, Any]:
    """Train under an MLflow run that ends as the training does."""
    from pipelines.tracking import client as tracking

    facts = {
        "preset": plan.preset,
        "run_id": plan.run_id,
        "tracking_uri": tracking.public(plan.tracking_uri),
        "data": plan.data_uri,
        "dataset_hash": dataset_hash,
        "config_hash": config_hash(plan.config),
        "git_commit": git_commit(),
        "world_size": max(1, plan.run.workers),
        "threads_per_worker": plan.run.threads,
        "stream": plan.run.stream,
        "precision": plan.run.precision,
        "accumulate": plan.run.accumulate,
        "compile": plan.run.compile,
        "versions": {"torch": torch.__version__},
    }
    if known is None:
        key = tracking.new_key(plan.run_id)
    else:
        key = known.get("run_key", known["mlflow_run_id"])
    facts |= {"run_key": key, "mlflow_run_id": known["mlflow_run_id"] if known else key}
    _write_down(plan, facts)  # before MLflow hears of the run, or a restart could make a second one
    journal = tracking.Journal.open(Path(plan.journal), plan.tracking_uri, key, plan.run_uri)
    facts["mlflow_run_id"] = _start_tracking(plan, facts, journal)
    _write_down(plan, facts)
    tracker = tracking.Tracker(journal)

    def handle(event: Event) -> None:
        """Pass one event on to MLflow and to whoever watches."""
        nonlocal show
        if measure is not None and "checkpoint" in event:
            event["metrics"] |= measure(event["checkpoint"])
        if "metrics" in event:
            tracker.log(event["metrics"], event["images_seen"])
        for name, png in event.get("figures", {}).items():
            tracker.figure(name, png, event["images_seen"])
        try:
            if show is not None:
                show(event)
        except OSError as error:  # a closed pipe, a full disk: no reason to stop training
            show = None
            log.warning("Nothing more is shown (%s); training goes on", error)

    status = "FAILED"
    try:
        with terminated_by_signal(), tracking.system_metrics(tracker):
            result = fit_somewhere(plan, facts, handle)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, Terminated):
        status = "KILLED"
        raise
    finally:
        tracker.close()
        tracking.end_run(plan.tracking_uri, journal.run_id, status, journal)
    return {"run_id": plan.run_id, "mlflow_run_id": journal.run_id, **result}


def _earlier_start(plan: Plan, dataset_hash: str) -> dict[str, Any] | None:
    """Return what an earlier start of this run id wrote down, or None.

    Raises:
        UserError: the id is taken and ``--resume`` not given, or settings or data are not the same.
    """
    where = storage.join(plan.run_uri, "run.json")
    if not storage.exists(where):
        return None
    if not plan.run.resume:
        raise UserError(
            f"The run id {plan.run_id} exists in {plan.run_uri}: add --resume to continue it, or "
            "choose another --run-id."
        )
    earlier = json.loads(storage.read_bytes(where))
    before, now = flatten(from_dict(earlier["config"])), flatten(plan.config)
    for name in HOW:
        now[name] = getattr(plan.run, name)
        before[name] = earlier.get(name, getattr(Run, name))
    changed = [k for k in now if now[k] != before[k] and k != "total_images"]
    if changed:
        told = ", ".join(f"{k} was {before[k]} and is {now[k]}" for k in changed)
        raise UserError(f"The run {plan.run_id} cannot be resumed with other settings: {told}.")
    check_same_data(f"The run {plan.run_id}", plan, earlier["dataset_hash"], dataset_hash)
    return earlier


def _write_down(plan: Plan, facts: dict[str, Any]) -> None:
    """Write what a later start of this run id has to know."""
    marker = json.dumps({**facts, "config": to_dict(plan.config)}, indent=2)
    storage.write_bytes(storage.join(plan.run_uri, "run.json"), marker.encode())


def _start_tracking(plan: Plan, facts: dict[str, Any], journal: "tracking.Journal") -> str:
    """Return the id of the MLflow run: the earlier one of this run id, or a new one."""
    from pipelines.tracking import client as tracking

    return tracking.start_run(
        plan.tracking_uri,
        experiment=f"ivegan-{plan.config.dataset}",
        run_name=plan.run_id,
        params={
            **flatten(plan.config),
            "workers": plan.run.workers,
            "threads": plan.run.threads,
            **{k: facts[k] for k in HOW},
        },
        tags={
            **plan.tags,
            "checkpoints": plan.run_uri,
            **{k: facts[k] for k in ("preset", "git_commit", "config_hash", "dataset_hash")},
        },
        config=to_dict(plan.config),
        dataset=(
            plan.config.dataset,
            facts["dataset_hash"],
            plan.data_uri or plan.config.dataset,
        ),
        parent_run_id=plan.run.parent_run,
        journal=journal,
    )
