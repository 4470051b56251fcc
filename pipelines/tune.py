"""Search learning rates and latent sizes with Ray Tune, by quality measured on held-out data.

    python pipelines/tune.py ring --samples 4
    python pipelines/tune.py digits --samples 12 --total-images 200000

A trial is ``train.fit`` with one worker inside a Tune function: the same loop, checkpoints and
tracking as a run of its own, under the name of sweep and trial. What decides is a score on the
validation split (``ivegan.evaluate.quality``), never a loss of the game. ASHA ends weak trials
early; MLflow shows one parent run per sweep and one child per trial.
"""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ivegan import checkpoint, cli, storage
from ivegan.config import PRESETS, Config, flatten, override, to_dict
from ivegan.errors import UserError
from pipelines import tracking, train

SCORE = "valid/quality"


@dataclass(frozen=True, kw_only=True)
class Sweep(cli.Options):
    """Search the preset's space of learning rates and latent sizes."""

    samples: int = 8
    """Trials."""
    max_concurrent: int = 0
    """Trials at once; 0 is as many as the cluster has CPUs, or GPUs with --gpu."""
    data: str | None = None
    """Shards, a folder or s3:// URI; digits builds its own on first use, points have none."""
    storage: str | None = None
    """Where run folders with checkpoints go, a folder or s3:// URI; runs/ by default."""
    gpu: bool = False
    """Give each trial a GPU."""
    search_seed: int = 0
    """Seed of the search; each trial's own seed is the setting ``seed``."""
    sweep_id: str | None = None
    """Name of the sweep; made from preset and time by default."""
    restore: str | None = None
    """Name of a sweep that was stopped, to finish it."""
    time_budget: float = 0.0
    """Seconds after which no trial goes on; 0 is no limit."""


def space(config: Config) -> dict[str, Any]:
    """Return what a sweep of this configuration's data set searches, by dotted name."""
    from ray import tune

    rates = {"optim.lr_g": tune.loguniform(1e-4, 2e-3), "optim.lr_d": tune.loguniform(1e-4, 2e-3)}
    if config.is_points:
        return {
            **rates,
            "model.z_dim": tune.choice([2, 3, 4]),
            "model.noise_dim": tune.choice([2, 4]),
        }
    sizes = [2, 3, 8, 16, 32] if config.dataset != "celeba" else [128, 256, 512, 1024]
    return {**rates, "model.z_dim": tune.choice(sizes), "model.noise_dim": tune.choice([2, 4, 8])}


def trial(changes: dict[str, Any], plan: train.Plan) -> None:
    """Train one point of the space, reporting its quality at every checkpoint."""
    from ray import tune

    from ivegan.evaluate import quality

    run_id = f"{plan.run_id}-{tune.get_context().get_trial_id()}"
    own = train.at(plan, override(plan.config, changes), run_id)

    def measure(at: str) -> dict[str, float]:
        config, encoder, generator, _ = checkpoint.load_networks(at)
        found = quality(config, encoder, generator, plan.data_uri, Path(plan.cache_dir))
        return {f"valid/{name}": value for name, value in found.items()}

    def report(event: train.Event) -> None:
        if "checkpoint" in event:  # after tracking, since a trial that is stopped ends in here
            seen, score = event["images_seen"], event["metrics"][SCORE]
            tune.report({SCORE: score, "images_seen": seen, "checkpoint": event["checkpoint"]})

    train.fit(own, show=report, measure=measure)


def sweep(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Run or restore a sweep; return its best configuration, score, trials and parent run."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    name = (
        options.restore or options.sweep_id or f"sweep-{preset}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    )
    run = train.Run(
        data=options.data, storage=options.storage, workers=0, gpu=options.gpu, run_id=name,
        resume=True,
    )  # fmt: skip
    plan = train.resolve(preset, config, run)
    if options.dry_run:
        print(json.dumps(plan.describe() | {"space": [*space(config)]}, indent=2))
        return plan.describe()
    dataset_hash = train.check_data(plan)
    marker = storage.join(plan.run_uri, "sweep.json")
    known = json.loads(storage.read_bytes(marker)) if storage.exists(marker) else None
    if known and not options.restore:
        raise UserError(f"The sweep {name} exists: give --restore {name}, or another --sweep-id.")
    if options.restore and not known:
        raise UserError(f"There is no sweep {name} below {plan.run_uri}; leave --restore out.")
    parent = tracking.start_run(
        plan.tracking_uri,
        experiment=f"ivegan-{config.dataset}",
        run_name=name,
        params=flatten(config) | {"samples": options.samples},
        tags={"preset": preset, "kind": "sweep", "dataset_hash": dataset_hash},
        config=to_dict(config),
        dataset=(config.dataset, dataset_hash, plan.data_uri or config.dataset),
        run_id=known["parent_run_id"] if known else None,
    )
    storage.write_bytes(marker, json.dumps({"parent_run_id": parent}).encode())
    status = "FAILED"
    try:
        # With its dashboard: without it, a stopped trial's resources are never given back.
        with train.ray_cluster(dashboard=True):
            filesystem, path = storage.filesystem(plan.run_uri)
            trainable = tune.with_resources(
                tune.with_parameters(trial, plan=train.at(plan, config, name, parent)),
                {"cpu": 1, "gpu": 1} if options.gpu else {"cpu": 1},
            )
            if options.restore:
                tuner = tune.Tuner.restore(
                    f"{path}/tune", trainable, storage_filesystem=filesystem, restart_errored=True
                )
            else:
                tuner = tune.Tuner(
                    trainable,
                    param_space=space(config),
                    tune_config=tune.TuneConfig(
                        metric=SCORE,
                        mode="max",
                        num_samples=options.samples,
                        max_concurrent_trials=options.max_concurrent or _slots(options.gpu),
                        time_budget_s=options.time_budget or None,
                        search_alg=BasicVariantGenerator(random_state=options.search_seed),
                        scheduler=ASHAScheduler(
                            time_attr="images_seen",
                            max_t=2 * config.total_images,  # or it would kill the finished ones too
                            grace_period=max(1, config.total_images // 4),
                            reduction_factor=2,
                        ),
                    ),
                    run_config=tune.RunConfig(
                        name="tune", storage_path=path, storage_filesystem=filesystem, verbose=1
                    ),
                )
            results = tuner.fit()
        tracking.deliver(Path(plan.journal).parent)
        tracking.end_children(plan.tracking_uri, parent, "stopped by the sweep")
        trials = [
            {"config": r.config, SCORE: r.metrics[SCORE], "images_seen": r.metrics["images_seen"]}
            for r in results
            if r.metrics and SCORE in r.metrics
        ]
        if not trials:
            raise UserError(f"No trial of {name} came as far as a score; see {plan.run_uri}.")
        trials.sort(key=lambda t: -t[SCORE])
        best = {
            f"best.{k}": str(v) for k, v in {**trials[0]["config"], SCORE: trials[0][SCORE]}.items()
        }
        tracking.set_tags(plan.tracking_uri, parent, best)
        status = "FINISHED"
    finally:
        tracking.end_run(plan.tracking_uri, parent, status)
    return {
        "best_config": trials[0]["config"],
        "best_metric": trials[0][SCORE],
        "trials": trials,
        "parent_run_id": parent,
        "sweep_id": name,
    }


def _slots(gpu: bool) -> int:
    """Return how many trials fit the cluster at once."""
    import ray

    return max(1, int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1)))


def main(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Search as the command line says; print the table and the best; return the JSON object."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "1")
    result = sweep(preset, config, options)
    if options.dry_run:
        return result
    print(f"\n{'score':>8} {'images':>10}  settings")
    for row in result["trials"]:
        told = "  ".join(f"{k}={_short(v)}" for k, v in row["config"].items())
        print(f"{row[SCORE]:>8.4f} {row['images_seen']:>10,}  {told}")
    flags = " ".join(f"--{k} {_short(v)}" for k, v in result["best_config"].items())
    print(f"\nbest: python pipelines/train.py {preset} {flags}")
    return result


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def command() -> None:
    """Run from the command line."""
    cli.run_preset(main, Sweep, PRESETS, default="ring")


if __name__ == "__main__":
    from pipelines.tune import command as named_command

    named_command()
