"""The driver of a sweep: Ray Tune with ASHA over trials that are runs of their own."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ivegan import storage
from ivegan.config import Config, flatten, override, to_dict
from ivegan.config import preset as preset_of
from ivegan.errors import UserError
from pipelines.cluster.session import (
    Terminated,
    in_a_thread,
    ray_session,
    require_resources,
    terminated_by_signal,
)
from pipelines.digits import prepare_digits
from pipelines.paths import runs_dir
from pipelines.sweeps import definition as definitions
from pipelines.sweeps import space
from pipelines.sweeps.definition import Definition, Sweep, define, plan_of, restored
from pipelines.sweeps.report import result_of
from pipelines.sweeps.trial import index_name, trial, trial_name
from pipelines.tracking import client as tracking
from pipelines.training.plan import (
    Plan,
    beside,
    check_data,
    check_same_data,
    git_commit,
    resolve,
    run_of,
)

log = logging.getLogger(__name__)


def sweep(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Run, resume or restore a sweep; return the JSON object of ``--json``.

    Args:
        preset: name of the preset.
        config: configuration of each trial, except for its searched settings.
        options: options of the sweep.

    Raises:
        UserError: impossible settings, a sweep that exists or does not, other data than those of
            its start, or no score at all.
    """
    if options.restore:
        preset, config, options = restored(options)
    plan = plan_of(preset, config, options)
    existing = definitions.read(plan.run_uri)
    definition = define(preset, config, options)
    for changes in definition.trials or ():  # an impossible trial ends the sweep before its start
        resolve(preset, override(config, changes), plan.run)
    if existing is not None:
        definitions.check_same(existing, definition, plan.run_id, options)
    if options.dry_run:
        described = {k: getattr(definition, k) for k in ("space", "trials")}
        described |= plan.describe() | {"objective": dataclasses.asdict(definition.objective)}
        print(json.dumps(described, indent=2))
        return described
    if existing is not None and existing.result is not None:
        return existing.result
    prepare_digits(plan)
    definition = dataclasses.replace(definition, dataset_hash=check_data(plan))
    if existing is not None:
        check_same_data(
            f"The sweep {plan.run_id}", plan, existing.dataset_hash, definition.dataset_hash
        )
    key = tracking.new_key(plan.run_id) if existing is None else existing.run_key
    definition = dataclasses.replace(definition, run_key=key)
    if existing is None:
        tracking.check(plan.tracking_uri)
    definitions.write(plan.run_uri, definition)
    with _tracked(plan, definition, options) as (parent, journal):
        ends = _search(beside(plan, config, plan.run_id, parent), definition, options)
        result = result_of(plan, definition, ends) | {"parent_run_id": parent}
        _publish(plan, journal, result)
    definitions.write(plan.run_uri, dataclasses.replace(definition, result=result))
    return result


def _search(plan: Plan, definition: Definition, options: Sweep) -> Any:
    """Run Tune to its end and return its results."""
    from pipelines.sweeps.report import Progress

    # With its dashboard: without it, a stopped trial's resources are never given back.
    with ray_session(dashboard=True), terminated_by_signal():
        require_resources(dataclasses.replace(plan.run, workers=options.workers), print)
        tuner = _tuner(plan, definition, options)
        # In the main thread Tune would handle Ctrl-C and return as if it had finished.
        Progress.cut.clear()
        return in_a_thread(tuner.fit, Progress.cut.set)


def _tuner(plan: Plan, definition: Definition, options: Sweep) -> Any:
    """Return Tune's own sweep: the interrupted one, or a new one."""
    from ray import tune

    from pipelines.sweeps.report import Progress

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Progress prints failures
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # Tune's own records, for --restore
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Progress prints the scores
    trials, objective = definition.trials, definition.objective
    folder = storage.join(plan.run_uri, "tune")
    filesystem, path = storage.filesystem(plan.run_uri)
    trainable = tune.with_resources(
        tune.with_parameters(
            trial,
            plan=plan,
            trials=trials,
            objective=objective,
            score_images=options.score_images,
        ),
        _resources(options),
    )
    names = storage.list_names(folder)
    if "tuner.pkl" in names and any(n.startswith("experiment_state-") for n in names):
        return tune.Tuner.restore(
            f"{path}/tune", trainable, storage_filesystem=filesystem, resume_errored=True
        )
    # Tune cannot read what a kill left of its first seconds; our checkpoints are elsewhere.
    storage.delete_folder(folder)
    count = options.samples if trials is None else len(trials)
    length = plan.config.total_steps * plan.config.batch_size
    progress = Progress(count, length, objective, functools.partial(_end_stopped, plan.run_uri))
    return tune.Tuner(
        trainable,
        param_space={} if trials is None else {"trial": tune.grid_search(list(range(count)))},
        tune_config=_tune_config(plan, definition, options, length),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[progress],
            failure_config=tune.FailureConfig(max_failures=2),  # of nodes: a trial continues
        ),
    )


def _tune_config(plan: Plan, definition: Definition, options: Sweep, length: int) -> Any:
    """Return Tune's configuration: ASHA, and Optuna's proposals where they are chosen."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    objective, algorithm = definition.objective, None
    if definition.trials is None:
        from ray.tune.search.optuna import OptunaSearch

        algorithm = OptunaSearch(
            space.domains(plan.config, definition.space),
            metric=objective.metric,
            mode=objective.mode,
            seed=options.search_seed,
        )
    return tune.TuneConfig(
        metric=objective.metric,
        mode=objective.mode,
        num_samples=options.samples if definition.trials is None else 1,
        max_concurrent_trials=options.max_concurrent or _slots(options),
        trial_dirname_creator=_folder_name,
        time_budget_s=options.time_budget or None,
        search_alg=algorithm,
        scheduler=ASHAScheduler(
            time_attr="images_seen",
            max_t=length - 1,  # no rung at the very end, where a trial stops by itself
            stop_last_trials=False,
            grace_period=min(options.grace or max(1, length // 4), length - 1),
            reduction_factor=options.reduction,
        ),
    )


def _folder_name(one: Any) -> str:
    """Return the name of Tune's own folder of a trial."""
    return trial_name(one.config, one.trial_id)


def _resources(options: Sweep) -> dict[str, Any]:
    """Return the resources of a trial's process; DDP workers have their own."""
    if options.workers > 1:
        return {"memory": 1}  # Tune refuses a trial without resources
    return {"cpu": options.threads} | ({"gpu": 1} if options.gpu else {})


def _slots(options: Sweep) -> int | None:
    """Return how many trials fit the cluster at once; None leaves it to Tune and an autoscaler."""
    import ray

    # Not with DDP workers: a trial that waits for nodes would hold memory for its driver.
    if options.wait_for_nodes and options.workers == 1 and os.environ.get("RAY_ADDRESS"):
        return None
    resources = ray.cluster_resources()
    slots = int(resources.get("CPU", 1)) // (options.workers * options.threads)
    if options.gpu:
        slots = min(slots, int(resources.get("GPU", 0)) // options.workers)
    return max(1, slots)


def retrain(preset: str, config: Config, options: Sweep, result: dict[str, Any]) -> dict[str, Any]:
    """Train the best configuration of a sweep at full length, evaluate it and register it.

    Args:
        preset, config, options: of the sweep.
        result: result of ``sweep``.
    """
    from pipelines import evaluate
    from pipelines.models.register import register
    from pipelines.progress import Display
    from pipelines.training.fit import fit

    images = options.retrain_images or preset_of(preset).total_images
    best = override(config, {**result["best_config"], "total_images": images})
    run = run_of(options, run_id=f"{result['sweep_id']}-best", resume=True)
    plan = resolve(preset, best, run)
    plan = dataclasses.replace(plan, tags={"sweep": result["sweep_id"]})
    with contextlib.closing(Display(plan)) as display:
        trained = fit(plan, show=display)
    out = runs_dir() / "reports" / plan.run_id
    evaluated = evaluate.evaluate_checkpoint(trained["checkpoint"], data=plan.data_uri, out=out)
    registered = register(trained["checkpoint"])
    return {**trained, "evaluation": evaluated, "report": str(out), "registered": registered}


# --- Tracking ---


@contextlib.contextmanager
def _tracked(
    plan: Plan, definition: Definition, options: Sweep
) -> Iterator[tuple[str, tracking.Journal]]:
    """Yield (id, journal) of the sweep's MLflow run, which ends as the sweep does."""
    journal = tracking.Journal.open(
        Path(plan.journal), plan.tracking_uri, definition.run_key, plan.run_uri
    )
    parent = _start_tracking(plan, definition, options, journal)
    status = "FAILED"
    try:
        yield parent, journal
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, Terminated):
        status = "KILLED"
        raise
    finally:
        _end_trials(plan, definition, parent, status, journal)
        tracking.end_run(plan.tracking_uri, parent, status, journal)


def _end_stopped(run_uri: str, name: str) -> None:
    """End the MLflow run of a trial that was stopped early."""
    tracking.end_stopped(f"{run_uri}-{name}", "stopped early by the sweep")


def _end_trials(
    plan: Plan, definition: Definition, parent: str, status: str, journal: tracking.Journal
) -> None:
    """End the MLflow runs of stopped trials, with their last points."""
    if status == "FINISHED":
        note = "stopped early by the sweep"
    else:
        note = f"the sweep was {'stopped' if status == 'KILLED' else 'ended by a failure'}"
    try:
        tracking.deliver(Path(plan.journal).parent)
    except UserError as error:
        log.warning("%s", error)
    folder, _, _ = plan.run_uri.rpartition("/")
    if definition.trials is None:
        names = [one for one in storage.list_names(folder) if one.startswith(f"{plan.run_id}-")]
    else:
        names = [f"{plan.run_id}-{index_name(i)}" for i in range(len(definition.trials))]
    trials = [storage.join(folder, name) for name in names]
    tracking.end_children(plan.tracking_uri, parent, note, journal, trials)


def _start_tracking(
    plan: Plan, definition: Definition, options: Sweep, journal: tracking.Journal
) -> str:
    """Return the id of the sweep's MLflow run, or its key during an outage."""
    dataset, digest = plan.config.dataset, definition.dataset_hash
    settings = {k: v for k, v in flatten(plan.config).items() if k not in definition.space}
    return tracking.start_run(
        plan.tracking_uri,
        experiment=f"ivegan-{dataset}",
        run_name=plan.run_id,
        params={
            **settings,
            **{f"space.{name}": text for name, text in definition.space.items()},
            "search": options.search,
            "samples": options.samples,
            "workers": options.workers,
        },
        tags={
            "preset": plan.preset,
            "kind": "sweep",
            "dataset_hash": digest,
            "git_commit": git_commit(),
            "checkpoints": plan.run_uri,
        },
        config=to_dict(plan.config),
        dataset=(dataset, digest, plan.data_uri or dataset),
        journal=journal,
    )


def _publish(plan: Plan, journal: tracking.Journal, result: dict[str, Any]) -> None:
    """Write a sweep's figure to storage, and figure and best trial to its MLflow run."""
    from pipelines.sweeps.report import picture

    png = picture(result)
    storage.write_bytes(result["figure"], png)
    metric = result["objective"]["metric"]
    with tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "sweep.png").write_bytes(png)
        tracking.add_report(journal, {metric: result["best_metric"]}, 0, Path(tmp))
    best = result["trials"][0]
    tags = {f"best.{k}": str(v) for k, v in best["config"].items()}
    tags |= {"best.run_id": best["run_id"], f"best.{metric}": str(best[metric])}
    tags["mlflow.note.content"] = (
        f"{len(result['trials'])} trials of {result['length']:,} images; the best has "
        f"{metric.removeprefix('valid/')} {best[metric]:.3f}. Train it with\n\n"
        f"    {result['command']}"
    )
    tracking.set_tags(plan.tracking_uri, journal.run_id, tags, journal)
