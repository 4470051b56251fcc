"""One trial of a sweep: a training run in a Tune function, scored at each checkpoint."""

import contextlib
import functools
from typing import Any

import torch

from ivegan import checkpoint
from ivegan.config import override
from ivegan.step import NonFiniteLossError
from pipelines.paths import cache_dir
from pipelines.record import write_points
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
    run_id = f"{plan.run_id}-{trial_name(chosen, tune.get_context().get_trial_id())}"
    parent = plan.run.parent_run or plan.run_id
    own = beside(plan, override(plan.config, changes), run_id, parent)
    measure = functools.partial(score, own, limit=score_images)

    def show(event: Event) -> None:
        if "checkpoint" in event:  # a trial that the scheduler stops ends in this call
            scores = {k: v for k, v in event["metrics"].items() if k.startswith("valid/")}
            tune.report(scores | {"images_seen": event["images_seen"]})

    if last := checkpoint.latest(own.run_uri):
        images_seen, scores = checkpoint.read_metadata(last)["images_seen"], measure(last)
        write_points(own.run_uri, images_seen, scores, "score")
        show({"metrics": scores, "images_seen": images_seen, "checkpoint": last})
    # A diverged trial is not tried again, and its earlier scores do not count.
    with contextlib.suppress(NonFiniteLossError):
        fit(own, show=show, measure=measure)
        return
    tune.report({objective.metric: objective.worst, "images_seen": 0, "diverged": True})


def score(plan: Plan, checkpoint_uri: str, limit: int) -> dict[str, float]:
    """Return ``valid/quality`` and its parts, of a checkpoint on the validation split."""
    from ivegan.evaluation.evaluate import quality

    # With DDP workers this process has no GPU of its own.
    device = torch.device("cpu") if plan.run.workers else device_of(plan.run)
    config, encoder, generator, _ = checkpoint.load_networks(checkpoint_uri)
    scores = quality(
        config,
        encoder.to(device),
        generator.to(device),
        plan.data_uri,
        cache_dir(plan.cache_dir),
        seed=SEED,
        limit=limit or None,
        skip_bad=plan.run.skip_bad,
    )
    return {f"valid/{name}": value for name, value in scores.items()}


def name_of(one: Any) -> str:
    """Return the name of one of Tune's trials."""
    return trial_name(one.config, one.trial_id)


def trial_name(chosen: dict[str, Any], trial_id: Any) -> str:
    """Return a trial's index in the sweep, or Tune's id where Optuna proposed it."""
    return index_name(chosen["trial"]) if "trial" in chosen else trial_id


def index_name(index: int) -> str:
    """Return the name of the trial with this index."""
    return f"{index:03d}"
