"""Ray Train as the back end of a training: its ranks, their outcome and their failures."""

from typing import Any

from ivegan import storage
from ivegan.errors import UserError
from ivegan.step import NonFiniteLossError
from pipelines.cluster.session import in_a_thread
from pipelines.training.plan import Plan
from pipelines.training.worker import work


def fit_ray(plan: Plan, metadata: dict[str, Any]) -> dict[str, Any]:
    """Train with Ray's workers and return rank 0's outcome.

    Raises:
        UserError: a worker raised it.
        NonFiniteLossError: training diverged.
    """
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    filesystem, path = storage.filesystem(storage.join(plan.run_uri, "ray"))
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"plan": plan, "metadata": metadata},
        scaling_config=ScalingConfig(
            num_workers=plan.run.workers,
            use_gpu=plan.run.gpu,
            resources_per_worker=plan.run.worker_resources,
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
        outcome = in_a_thread(trainer.fit).return_value
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    assert isinstance(outcome, dict), "rank 0 returns the outcome"
    if "diverged" in outcome:
        raise NonFiniteLossError(outcome["diverged"])
    return outcome


def _ray_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train on one of Ray's ranks."""
    try:
        return work(payload["plan"], payload["metadata"])
    except NonFiniteLossError as error:
        # Returned, not raised: every retry would diverge again.
        return {"diverged": str(error)}


def _cause(error: Exception) -> Exception:
    """Return the user's mistake behind a failed training, or the failure itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return UserError(str(cause))
            cause = cause.__cause__
    return error
