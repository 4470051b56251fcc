"""Ray Train as the back end of a training: its ranks, their outcome and their failures."""

import logging
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ivegan import checkpoint, storage
from ivegan.errors import UserError
from ivegan.step import NonFiniteLossError
from pipelines import record as records
from pipelines.cluster.session import in_a_thread
from pipelines.training.plan import Plan
from pipelines.training.worker import work

log = logging.getLogger(__name__)

_Outcome = UserError | NonFiniteLossError | None
_FAILURES = 3  # of workers that a run continues after


def fit_ray(
    plan: Plan, metadata: dict[str, Any], key: str, room: Callable[[], int] | None = None
) -> None:
    """Train with Ray's workers.

    Where workers fail, others continue from the last checkpoint; after three failures without a
    new one the training ends.

    Args:
        plan, metadata: of the run, and of its checkpoints.
        key: of the run's record.
        room: returns how many workers an elastic run continues with after a failure.

    Raises:
        UserError: a worker raised it, or the workers do not see the driver's storage.
        NonFiniteLossError: training diverged.
    """
    from ray.train import TrainingFailedError

    failures, last = 0, None
    while True:
        try:
            failure = _fit(plan, metadata, key, elastic=room is not None)
            break
        except TrainingFailedError as error:
            cause = _cause(error)
            before, last = last, checkpoint.latest(plan.run_uri)
            failures = failures + 1 if last == before else 1
            if failures > _FAILURES or isinstance(cause, UserError):
                raise cause from error
            log.warning("The workers failed; the run continues from its last checkpoint.")
            if room is not None:
                plan = plan.of_size(room())
    if failure is not None:
        raise failure


def _fit(plan: Plan, metadata: dict[str, Any], key: str, *, elastic: bool) -> _Outcome:
    """Run one of Ray's trainers, which ends at the first failure of a worker."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    filesystem, path = storage.filesystem(storage.join(plan.run_uri, "ray"))
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"plan": plan, "metadata": metadata, "key": key},
        scaling_config=ScalingConfig(
            num_workers=plan.run.workers,
            use_gpu=plan.run.gpu,
            resources_per_worker=plan.run.worker_resources,
        ),
        run_config=RunConfig(
            name=plan.run_id,
            storage_path=path,
            storage_filesystem=filesystem,
            # Workers that find no room are waited for, except where fewer will do.
            failure_config=FailureConfig(
                max_preemption_failures=0, controller_failure_limit=0 if elastic else -1
            ),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    return in_a_thread(trainer.fit).return_value


def _ray_worker(payload: dict[str, Any]) -> _Outcome:
    """Train on one of Ray's ranks; return an error that each retry would end in."""
    if refusal := unshared(payload["plan"].run_uri, payload["key"]):
        return UserError(refusal)
    try:
        work(payload["plan"], payload["metadata"], preempted=_preempted)
    except NonFiniteLossError as error:
        return NonFiniteLossError(str(error))
    return None


def _preempted() -> bool:
    """Return, the same on every rank, whether Ray has announced the end of a rank's node."""
    import ray.train

    return ray.train.get_preemption_info() is not None


def unshared(run_uri: str, key: str) -> str:
    """Return, the same on every rank, why the ranks cannot share a run's folder; "" if they can.

    Args:
        run_uri: the run's folder.
        key: of the record that the driver has written there.
    """
    nodes: list[str] = [""] * dist.get_world_size()
    try:
        sees = records.read_record(run_uri).key == key
    except UserError:
        sees = False
    dist.all_gather_object(nodes, "" if sees else socket.gethostname())
    blind = [node for node in nodes if node]
    if not blind:
        return ""
    return (
        f"{len(blind)} of {len(nodes)} workers do not see {run_uri} of the driver's node (on "
        f"{', '.join(sorted({*blind}))}): give --storage s3://BUCKET/FOLDER, or a folder that all "
        "nodes share."
    )


def _cause(error: Exception) -> Exception:
    """Return the user's mistake behind a failed training, or the failure itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                kind = storage.Unavailable if isinstance(cause, storage.Unavailable) else UserError
                return kind(str(cause))
            cause = cause.__cause__
    return error
