"""One trial of a sweep: a training run in a Tune function, scored at each checkpoint."""

import contextlib
from typing import Any

import torch

from ivegan import checkpoint
from ivegan.config import override
from ivegan.step import NonFiniteLossError
from pipelines.paths import cache_dir
from pipelines.sweeps.space import SearchObjective
from pipelines.training.fit import fit
from pipelines.training.follow import Event
from pipelines.training.plan import Plan, beside
from pipelines.training.worker import device_of

SEED = 20_161_105
"""Seed of the draws of a score; an evaluation has another one, so that trials are not chosen on the
samples that they are judged by in the end."""


def trial(
    chosen: dict[str, Any],
    plan: Plan,
    trials: list[dict[str, Any]] | None,
    objective: SearchObjective,
    score_images: int,
) -> None:
    """Train one point of the space, reporting its scores at each checkpoint.

    An interrupted trial continues from its last checkpoint, whose score it reports again.

    Args:
        chosen: Tune's configuration: the index into ``trials``, or the settings themselves.
        plan: plan that all trials share.
        trials: settings of each trial, or None where Optuna proposes them.
        objective: score that trials are compared by.
        score_images: validation images of a score; 0 is all.
    """
    from ray import tune

    torch.set_num_threads(plan.run.threads)
    changes = trials[chosen["trial"]] if trials else chosen
    trial_id = tune.get_context().get_trial_id()
    assert trial_id is not None, "a Tune session"
    run_id = f"{plan.run_id}-{trial_name(chosen, trial_id)}"
    parent = plan.run.parent_run or plan.run_id
    own = beside(plan, override(plan.config, changes), run_id, parent)
    # With DDP workers this process has no GPU of its own.
    device = torch.device("cpu") if plan.run.workers else device_of(plan.run)

    def measure(checkpoint_uri: str) -> dict[str, float]:
        return score(own, checkpoint_uri, device, score_images)

    def report(scores: dict[str, float], images_seen: int, checkpoint_uri: str) -> None:
        scores = {k: v for k, v in scores.items() if k.startswith("valid/")}
        tune.report({**scores, "images_seen": images_seen, "checkpoint": checkpoint_uri})

    def show(event: Event) -> None:
        if "checkpoint" in event:  # a trial that the scheduler stops ends in this call
            report(event["metrics"], event["images_seen"], event["checkpoint"])

    if last := checkpoint.latest(own.run_uri):
        report(measure(last), checkpoint.read_metadata(last)["images_seen"], last)
    # A diverged trial is not tried again, and its earlier scores do not count.
    with contextlib.suppress(NonFiniteLossError):
        fit(own, show=show, measure=measure)
        return
    tune.report({objective.metric: objective.worst, "images_seen": 0, "diverged": True})


def score(plan: Plan, checkpoint_uri: str, device: torch.device, limit: int) -> dict[str, float]:
    """Return ``valid/quality`` and its parts, of a checkpoint on the validation split."""
    from ivegan.evaluation.evaluate import quality

    config, encoder, generator, _ = checkpoint.load_networks(checkpoint_uri)
    scores = quality(
        config,
        encoder.to(device),
        generator.to(device),
        plan.data_uri,
        cache_dir(plan.cache_dir),
        seed=SEED,
        limit=limit or None,
    )
    return {f"valid/{name}": value for name, value in scores.items()}


def trial_name(chosen: dict[str, Any], trial_id: str) -> str:
    """Return a trial's index in the sweep, or Tune's id where Optuna proposed it."""
    return index_name(chosen["trial"]) if "trial" in chosen else trial_id


def index_name(index: int) -> str:
    """Return the name of the trial with this index."""
    return f"{index:03d}"
