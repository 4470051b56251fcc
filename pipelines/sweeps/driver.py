"""The driver of a sweep: Ray Tune with ASHA over trials that are runs of their own."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

from ivegan import storage
from ivegan.config import Config, override
from ivegan.config import preset as preset_of
from ivegan.errors import UserError
from ivegan.step import NonFiniteLossError
from pipelines import record as records
from pipelines.claim import PATIENCE, claimed
from pipelines.cluster.session import (
    Terminated,
    in_a_thread,
    ray_session,
    require_resources,
    started,
    terminated_by_signal,
)
from pipelines.digits import prepare_digits
from pipelines.paths import tracking_uri
from pipelines.sweeps import definition as definitions
from pipelines.sweeps import space
from pipelines.sweeps.definition import Definition, Sweep, define, plan_of
from pipelines.sweeps.figure import picture
from pipelines.sweeps.report import ScorePrinter, command_of, result_of
from pipelines.sweeps.trial import index_name, name_of, trial
from pipelines.tracking import client as tracking
from pipelines.tracking.mirror import mirror_or_warn, run_id_of
from pipelines.training.fit import fit, new_record, recorded
from pipelines.training.plan import (
    Plan,
    beside,
    check_data,
    check_same_data,
    resolve,
    run_of,
)

log = logging.getLogger(__name__)


def sweep(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Run or resume a sweep; return the JSON object of ``--json``.

    Raises:
        UserError: impossible settings, a sweep that exists, other data than those of its start, or
            no score at all.
    """
    plan = plan_of(preset, config, options)
    existing = definitions.read(plan.run_uri)
    definition = define(preset, config, options)
    for changes in definition.trials or ():  # an impossible trial ends the sweep before its start
        resolve(preset, override(config, changes), plan.run)
    taken = existing is None and records.exists(plan.run_uri)
    if taken and records.read_record(plan.run_uri).kind != "sweep":
        raise UserError(f"{plan.run_id} is a run of train.py: choose another --sweep-id.")
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
    else:
        tracking.check(plan.tracking_uri, plan.experiment)
    patience = PATIENCE if options.resume else 0.0
    with claimed(plan.run_uri, patience, log.info) as lost:
        searched = {f"space.{name}": text for name, text in definition.space.items()}
        own = {name: getattr(options, name) for name in ("search", "samples", "workers")}
        record = new_record(
            plan,
            definition.dataset_hash,
            kind="sweep",
            world_size=options.workers,
            tags={"kind": "sweep"},
            params=searched | own,
        )
        definitions.write(plan.run_uri, definition)
        with recorded(plan.run_uri, record, plan.tracking_uri, lost):
            result = _searched(plan, definition, options)
            if options.confirm:
                result = _confirmed(plan, definition, options, result)
            _publish(plan, result)
    result["parent_run_id"] = run_id_of(plan.run_uri)
    definitions.write(plan.run_uri, dataclasses.replace(definition, result=result))
    return result


def _searched(plan: Plan, definition: Definition, options: Sweep) -> dict[str, Any]:
    """Run all trials of a definition and return their result."""
    with _trials_ended(plan, definition):
        ends = _search(plan, definition, options)
    return result_of(plan, definition, ends)


def _confirmed(
    plan: Plan, definition: Definition, options: Sweep, result: dict[str, Any]
) -> dict[str, Any]:
    """Train the best candidates again on fresh seeds, and sort them by their mean score.

    The seed of a search is part of what it selects for: its best score is biased upwards.
    """
    objective, metric = definition.objective, definition.objective.metric
    best = [t for t in result["trials"] if t[metric] is not None][: options.confirm]
    seeds = [plan.config.seed + 1_000_003 + i for i in range(options.confirm_seeds)]
    runs = [t["config"] | {"seed": seed} for t in best for seed in seeds]
    print(f"confirming the best {len(best)} trials on {len(seeds)} fresh seeds", flush=True)
    again = _searched(
        beside(plan, plan.config, f"{plan.run_id}-confirm", plan.run_id),
        dataclasses.replace(definition, trials=runs),
        dataclasses.replace(options, grace=plan.images, time_budget=0),
    )
    scores = {t["trial"]: t[metric] for t in again["trials"]}
    for i, candidate in enumerate(best):
        own = [scores[index_name(i * len(seeds) + j)] for j in range(len(seeds))]
        candidate["confirmed_scores"] = own  # None: the candidate diverged on that seed
        candidate["confirmed"] = None if None in own else sum(own) / len(own)
    best.sort(key=lambda t: objective.rank(t["confirmed"]))
    if best[0]["confirmed"] is None:
        raise UserError(
            f"Each of the best {len(best)} trials of {plan.run_id} diverged on a fresh seed: let "
            "--space search smaller learning rates, or confirm more trials with --confirm."
        )
    others = [t for t in result["trials"] if "confirmed" not in t]
    return result | {
        "trials": best + others,
        "best_config": best[0]["config"],
        "best_metric": best[0]["confirmed"],
        "command": command_of(plan, best[0]["config"]),
    }


def _search(plan: Plan, definition: Definition, options: Sweep) -> Any:
    """Run Tune to its end and return its results."""
    # With its dashboard: without it, a stopped trial's resources are never given back.
    with ray_session(dashboard=True), terminated_by_signal():
        each = options.worker_resources
        require_resources([options.workers], each, options.wait_for_nodes, print)
        tuner = _tuner(plan, definition, options)
        # In the main thread Tune would handle Ctrl-C and return as if it had finished.
        ScorePrinter.cut.clear()
        return in_a_thread(tuner.fit, ScorePrinter.cut.set)


def _tuner(plan: Plan, definition: Definition, options: Sweep) -> Any:
    """Return Tune's own sweep: the interrupted one, or a new one."""
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # ScorePrinter prints failures
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # Tune's own records, for --restore
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # ScorePrinter prints the scores
    trials = definition.trials
    folder = storage.join(plan.run_uri, "tune")
    filesystem, path = storage.filesystem(plan.run_uri)
    function = tune.with_parameters(
        trial,
        plan=plan,
        trials=trials,
        objective=definition.objective,
        score_images=options.score_images,
    )
    # DDP workers have resources of their own, but Tune refuses a trial without any.
    own: dict[str, Any] = {"cpu": options.threads, "gpu": int(options.gpu)}
    trainable = tune.with_resources(function, own if options.workers == 1 else {"memory": 1})
    names = storage.list_names(folder)
    if "tuner.pkl" in names and any(n.startswith("experiment_state-") for n in names):
        return tune.Tuner.restore(
            f"{path}/tune", trainable, storage_filesystem=filesystem, resume_errored=True
        )
    # Tune cannot read what a kill left of its first seconds; our checkpoints are elsewhere.
    storage.delete_folder(folder)
    count = options.samples if trials is None else len(trials)
    # Tune stores its callbacks beside the runs: none may hold the tracking store's password.
    stopped = functools.partial(_end_stopped, plan.run_uri)
    printer = ScorePrinter(count, plan.config.total_images, definition.objective, stopped)
    return tune.Tuner(
        trainable,
        param_space={} if trials is None else {"trial": tune.grid_search(list(range(count)))},
        tune_config=_tune_config(plan, definition, options),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[printer],
            failure_config=tune.FailureConfig(max_failures=2),  # of nodes: a trial continues
        ),
    )


def _tune_config(plan: Plan, definition: Definition, options: Sweep) -> Any:
    """Return Tune's configuration: ASHA, and Optuna's proposals where they are chosen."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    objective, algorithm, length = definition.objective, None, plan.images
    if definition.trials is None:
        from ray.tune.search.optuna import OptunaSearch

        algorithm = OptunaSearch(
            space.domains(plan.config, definition.space),
            metric=objective.metric,
            mode=objective.mode,
            seed=options.search_seed,
        )
    scheduler = None  # no early stopping
    if options.grace < length:
        scheduler = ASHAScheduler(
            time_attr="images_seen",
            max_t=length - 1,  # no rung at the very end, where a trial stops by itself
            stop_last_trials=False,
            grace_period=options.grace or max(1, length // 4),
            reduction_factor=options.reduction,
        )
    return tune.TuneConfig(
        metric=objective.metric,
        mode=objective.mode,
        num_samples=options.samples if definition.trials is None else 1,
        max_concurrent_trials=options.max_concurrent or _slots(options),
        trial_dirname_creator=name_of,
        time_budget_s=options.time_budget or None,
        search_alg=algorithm,
        scheduler=scheduler,
    )


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
    """Train the best configuration of a sweep at full length, evaluate it and register it."""
    from pipelines.evaluate import Evaluate, evaluate_checkpoint
    from pipelines.models.register import register
    from pipelines.progress import Display

    images = options.retrain_images or preset_of(preset).total_images
    best = override(config, {**result["best_config"], "total_images": images})
    run = run_of(options, run_id=f"{result['sweep_id']}-best", resume=True)
    plan = resolve(preset, best, run)
    plan = dataclasses.replace(plan, tags={"sweep": result["sweep_id"]})
    with contextlib.closing(Display(plan)) as display:
        try:
            trained = fit(plan, show=display)
        except NonFiniteLossError as error:
            raise UserError(f"The best of the sweep diverged at full length: {error}") from error
    out = records.evaluation_uri(plan.run_uri, trained["images_seen"])
    measured = Evaluate(checkpoint=trained["checkpoint"], data=plan.data_uri, out=out)
    trained |= {"evaluation": evaluate_checkpoint(measured)["metrics"], "report": out}
    return trained | {"registered": register(trained["checkpoint"])}


@contextlib.contextmanager
def _trials_ended(plan: Plan, definition: Definition) -> Iterator[None]:
    """Record trials that still run when the block ends as KILLED, and mirror all trials."""
    reason = "the sweep was ended by a failure"
    try:
        yield
        reason = _EARLY
    except (KeyboardInterrupt, SystemExit, Terminated):
        reason = "the sweep was stopped"
        raise
    finally:
        folder = plan.run_uri.rpartition("/")[0]
        if definition.trials is None:
            names = [n for n in storage.list_names(folder) if n.startswith(f"{plan.run_id}-")]
        else:
            names = [f"{plan.run_id}-{index_name(i)}" for i in range(len(definition.trials))]
        parent = plan.run.parent_run or plan.run_id  # of a trial: a sweep S-2 is none of S
        for uri in (storage.join(folder, name) for name in names):
            if records.exists(uri) and records.read_record(uri).parent == parent:
                _end_trial(uri, plan.tracking_uri, reason)


_EARLY = "stopped early by the sweep"


def _end_trial(run_uri: str, store: str, reason: str) -> None:
    """Record a trial that still runs as KILLED, and mirror it."""
    if records.read_record(run_uri).status == "RUNNING":
        records.end_record(run_uri, "KILLED", ended=reason)
    mirror_or_warn(run_uri, store, f"the end of {run_uri}")


def _end_stopped(run_uri: str, name: str) -> None:
    """Record a trial that was stopped early, in a thread: Tune does not wait for MLflow."""
    started(_end_trial, f"{run_uri}-{name}", tracking_uri(), _EARLY)


def _publish(plan: Plan, result: dict[str, Any]) -> None:
    """Write the figure of a sweep, its best score and the tags of its best trial."""
    storage.write_bytes(result["figure"], picture(result))
    metric, score = result["objective"]["metric"], result["best_metric"]
    records.write_points(plan.run_uri, 0, {metric: score})
    tags = {f"best.{k}": str(v) for k, v in result["best_config"].items()}
    tags |= {"best.run_id": result["trials"][0]["run_id"], f"best.{metric}": str(score)}
    tags["mlflow.note.content"] = (
        f"{len(result['trials'])} trials of {result['length']:,} images; the best has "
        f"{metric.removeprefix('valid/')} {score:.3f}. Train it with\n\n"
        f"    {result['command']}"
    )
    record = records.read_record(plan.run_uri)
    records.write_record(plan.run_uri, dataclasses.replace(record, tags=record.tags | tags))
