"""Search learning rates and latent sizes with Ray Tune, by quality measured on held-out data.

    python pipelines/tune.py ring --samples 12
    python pipelines/tune.py mnist --data runs/data/mnist --search grid --samples 3 \\
        --space "model.z_dim=2,3,8,16,32 model.noise_dim=" --total-images 100000
    python pipelines/tune.py --restore sweep-ring-20261123-101500

A trial is ``fit`` inside a Tune function: the same loop, checkpoints and tracking as a run of
its own, under the name of sweep and trial. What decides is a score on the validation split
(``space.Objective``), never a loss of the game. ASHA ends weak trials early; MLflow shows
one parent run per sweep and one child per trial.

All that a sweep is lies in ``STORAGE/SWEEP_ID/sweep.json`` before the first trial starts: its
settings and, for random and grid search, those of every trial. So whatever a crash leaves of Tune's
own records, the same trial always has the same settings, name, checkpoints and MLflow run.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ivegan import checkpoint, storage
from ivegan.config import PRESETS, Config, flatten, from_dict, override, to_dict
from ivegan.config import preset as preset_of
from ivegan.errors import UserError
from ivegan.step import NonFiniteLossError
from pipelines import options as cli
from pipelines.cluster.session import (
    Terminated,
    in_a_thread,
    ray_session,
    require_resources,
    stopped,
    terminated_by_signal,
)
from pipelines.digits import prepare_digits
from pipelines.paths import new_id, runs_dir, runs_uri
from pipelines.progress import Display
from pipelines.sweeps import space
from pipelines.tracking import client as tracking
from pipelines.training.fit import fit
from pipelines.training.plan import (
    Plan,
    Run,
    beside,
    check_data,
    check_same_data,
    git_commit,
    resolve,
)
from pipelines.training.worker import Event, device_of

log = logging.getLogger(__name__)

_MARKER = "sweep.json"  # all that a sweep is
_PAGE = "sweep.html"
_SEED = 20_161_105
"""Of all draws that a score is made of: another than an evaluation's, so that what chooses between
trials is not what they are judged by in the end."""


@dataclass(frozen=True, kw_only=True)
class Sweep(cli.Options):
    """Search the preset's space of learning rates and latent sizes.

    Settings that are not searched are those of the preset, and can be changed by their flags.
    """

    samples: int = 8
    """Trials; of a grid, times that it is gone through."""
    space: str = ""
    """What to search beside or instead of the preset's space: "optim.lr_g=1e-4..1e-2 seed=0,1
    model.z_dim=", a range, a choice, and a setting left out."""
    search: Literal["random", "grid", "optuna"] = "random"
    """How trials are chosen; a grid takes every combination of the choices, ranges are drawn."""
    score: str = ""
    """What decides between trials, "valid/near" for instance; the preset's own by default."""
    search_seed: int = 0
    """Seed of the search; each trial's own seed is the setting ``seed``."""
    grace: int = 0
    """Images before a trial may be stopped early; 0 is a quarter of its length."""
    scores: int = 10
    """Times that a trial is scored, evenly over its length, the end included."""
    score_images: int = 2000
    """Validation images that a score looks at, and five times as many train images; 0 is all."""
    reduction: int = 2
    """Of so many trials that come equally far, one goes on."""
    time_budget: float = 0.0
    """Seconds after which no trial goes on; 0 is no limit."""
    max_concurrent: int = 0
    """Trials at once; 0 is as many as the cluster has CPUs for, or GPUs with --gpu, and with
    --wait-for-nodes as many as its autoscaler can make room for."""
    workers: int = 1
    """DDP workers of each trial; a single one runs in the trial's own process."""
    threads: int = 1
    """CPU threads of each worker."""
    gpu: bool = False
    """Give each worker a GPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in while they are trained."""
    wait_for_nodes: float = 0.0
    """Seconds to wait for a cluster's autoscaler to add what is missing."""
    data: str | None = None
    """Shards, a folder or s3:// URI; digits builds its own on first use, points have none."""
    stream: bool = False
    """Train on shards read over and over; scores keep train and validation images decoded."""
    loaders: int = 1
    """With --stream, processes per worker that read ahead; 0 is none."""
    storage: str | None = None
    """Where run folders with checkpoints go, a folder or s3:// URI; runs/ by default."""
    sweep_id: str | None = None
    """Name of the sweep; made from preset and time by default."""
    resume: bool = False
    """Finish the sweep of that --sweep-id if there is one, start it otherwise."""
    restore: str | None = None
    """Name of a sweep that was stopped, to finish it as it was begun, whatever else is given. Only
    from storage that you trust: Ray's records of a sweep are pickles."""
    retrain: bool = False
    """Train the best configuration at full length, evaluate it and register it as a candidate."""
    retrain_images: int = 0
    """Length of that training; 0 is the preset's own."""

    def __post_init__(self) -> None:
        self.at_least(samples=1, scores=1, workers=1, threads=1, reduction=2)
        self.at_least(score_images=0, grace=0, time_budget=0, max_concurrent=0)
        self.at_least(retrain_images=0, wait_for_nodes=0, loaders=0)


def sweep(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Run, resume or restore a sweep; return what ``--json`` prints.

    Args:
        preset: name of the preset.
        config: of every trial, but for what is searched.
        options: of the sweep.

    Raises:
        UserError: settings that cannot be, a sweep that exists or does not, other data than it was
            begun on, or not one score.
    """
    if options.restore:
        preset, config, options = restored(options)
    plan = _resolved(preset, config, options)
    marker = storage.join(plan.run_uri, _MARKER)
    known = json.loads(storage.read_bytes(marker)) if storage.exists(marker) else None
    begun = _begun(preset, config, options)
    for changes in begun["trials"] or ():  # so that an impossible trial is told at once
        resolve(preset, override(config, changes), plan.run)
    if known is not None:
        _check_same(known, begun, plan.run_id, options)
    if options.dry_run:
        told = plan.describe() | {k: begun[k] for k in ("space", "objective", "trials")}
        print(json.dumps(told, indent=2))
        return told
    result = known.get("result") if known else None
    if result is not None and storage.exists(storage.join(plan.run_uri, _PAGE)):
        return result
    prepare_digits(plan)
    begun["dataset_hash"] = check_data(plan)
    if known is None:  # nothing runs yet, so a wrong address is told at once
        tracking.check(plan.tracking_uri)
    else:
        before, now = known["dataset_hash"], begun["dataset_hash"]
        check_same_data(f"The sweep {plan.run_id}", plan, before, now)
    key = known["run_key"] if known else tracking.new_key(plan.run_id)
    begun["run_key"] = key
    if result is None:
        storage.write_bytes(marker, json.dumps(begun, indent=2).encode())
    journal = tracking.Journal.open(Path(plan.journal), plan.tracking_uri, key, plan.run_uri)
    parent = _start_tracking(plan, begun, options, journal)
    status = "FAILED"
    try:
        if result is None:
            found = _search(beside(plan, config, plan.run_id, parent), begun, options)
            result = {**_result(plan, begun, found), "parent_run_id": parent}
            # Before the pictures: whatever is wrong with them, nothing is searched again.
            storage.write_bytes(marker, json.dumps({**begun, "result": result}, indent=2).encode())
        _publish(plan, journal, result)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, Terminated):
        status = "KILLED"
        raise
    finally:
        _end_trials(plan, begun, parent, status, journal)
        tracking.end_run(plan.tracking_uri, parent, status, journal)
    return result


def restored(options: Sweep) -> tuple[str, Config, Sweep]:
    """Return preset, configuration and options to go on with the sweep that --restore names.

    All is as it was begun, whatever else is given, but for --storage and for a retraining, which
    may be asked for then or now.

    Raises:
        UserError: there is no such sweep.
    """
    assert options.restore, "there is something to restore"
    folder = runs_uri(options.storage)
    marker = storage.join(folder, options.restore, _MARKER)
    if not storage.exists(marker):
        raise UserError(f"There is no sweep {options.restore} in {folder}: check --storage.")
    known = json.loads(storage.read_bytes(marker))
    then = {
        **known["options"],
        "retrain": options.retrain or known["options"]["retrain"],
        "retrain_images": options.retrain_images or known["options"]["retrain_images"],
    }
    options = dataclasses.replace(
        options, **then, restore=None, sweep_id=options.restore, resume=True
    )
    return known["preset"], from_dict(known["config"]), options


def _resolved(preset: str, config: Config, options: Sweep) -> Plan:
    """Return the plan that all trials share."""
    run = _run(
        options,
        options.sweep_id or new_id(f"sweep-{preset}"),
        options.workers if options.workers > 1 else 0,
        save_every=-(-config.total_images // options.scores),
    )
    return resolve(preset, config, run)


def _run(options: Sweep, run_id: str, workers: int, save_every: int = 0) -> Run:
    """Return where and how fast a run of a sweep is made."""
    return Run(
        data=options.data,
        stream=options.stream,
        loaders=options.loaders,
        storage=options.storage,
        workers=workers,
        threads=options.threads,
        gpu=options.gpu,
        precision=options.precision,
        wait_for_nodes=options.wait_for_nodes,
        save_every=save_every,
        run_id=run_id,
        resume=True,
    )


def _begun(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Return what ``sweep.json`` holds when a sweep begins.

    Raises:
        UserError: a space or a score that is not known, or Optuna where it is not installed.
    """
    searched = space.space_of(config, options.space)
    trials = None
    if options.search != "optuna":
        grid = options.search == "grid"
        trials = space.draw(searched, options.samples, options.search_seed, grid=grid)
    elif importlib.util.find_spec("optuna") is None:
        raise UserError("--search optuna needs Optuna: pip install optuna.")
    mine = dataclasses.asdict(options)
    for name in ("dry_run", "json", "restore", "resume", "sweep_id", "storage"):
        del mine[name]
    if options.data:  # the same from any folder
        mine["data"] = storage.absolute(options.data)
    return {
        "preset": preset,
        "config": to_dict(config),
        "options": mine,
        "space": space.spelled(searched),
        "objective": dataclasses.asdict(space.objective_of(config, options.score)),
        "trials": trials,
    }


def _check_same(known: dict[str, Any], begun: dict[str, Any], name: str, options: Sweep) -> None:
    """See that an earlier sweep of this name may be gone on with."""
    if not options.resume:
        raise UserError(f"The sweep {name} exists: give --restore {name}, or another --sweep-id.")
    same = ("preset", "config", "space", "objective", "trials")
    changed = [k for k in same if known.get(k) != begun[k]]
    if changed:
        raise UserError(
            f"The sweep {name} was begun with another {' and '.join(changed)}: --restore {name} "
            "goes on as it was begun; or choose another --sweep-id."
        )


def _end_trials(
    plan: Plan, begun: dict[str, Any], parent: str, status: str, journal: tracking.Journal
) -> None:
    """End the MLflow runs of trials that were stopped, with what they had still to say."""
    if status == "FINISHED":
        note = "stopped early by the sweep"
    else:
        note = f"the sweep was {'stopped' if status == 'KILLED' else 'ended by a failure'}"
    try:
        tracking.deliver(Path(plan.journal).parent)
    except UserError as error:
        log.warning("%s", error)
    folder, _, _ = plan.run_uri.rpartition("/")
    if begun["trials"] is None:
        names = [one for one in storage.list_names(folder) if one.startswith(f"{plan.run_id}-")]
    else:
        names = [f"{plan.run_id}-{_place(place)}" for place in range(len(begun["trials"]))]
    trials = [storage.join(folder, name) for name in names]
    tracking.end_children(plan.tracking_uri, parent, note, journal, trials)


def _start_tracking(
    plan: Plan, begun: dict[str, Any], options: Sweep, journal: tracking.Journal
) -> str:
    """Return the id of the sweep's MLflow run, or its key during an outage."""
    dataset, digest = plan.config.dataset, begun["dataset_hash"]
    searched = {f"space.{name}": told for name, told in begun["space"].items()}
    return tracking.start_run(
        plan.tracking_uri,
        experiment=f"ivegan-{dataset}",
        run_name=plan.run_id,
        params={
            **{k: v for k, v in flatten(plan.config).items() if k not in begun["space"]},
            **searched,
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


def trial(
    chosen: dict[str, Any],
    plan: Plan,
    trials: list[dict[str, Any]] | None,
    objective: space.Objective,
    score_images: int,
) -> None:
    """Train one point of the space, reporting its scores at every checkpoint.

    A trial that was cut off goes on from its last checkpoint, whose score it reports again.

    Args:
        chosen: what Tune hands over: the place in ``trials``, or the settings themselves.
        plan: that all trials share.
        trials: the settings of each, where they are known beforehand.
        objective: what decides between trials.
        score_images: validation images that a score looks at; 0 is all.
    """
    from ray import tune

    from ivegan.evaluation.evaluate import quality

    torch.set_num_threads(plan.run.threads)
    changes = trials[chosen["trial"]] if trials else chosen
    trial_id = tune.get_context().get_trial_id()
    assert trial_id is not None, "this is a trial"
    name = trial_name(chosen, trial_id)
    own = beside(plan, override(plan.config, changes), f"{plan.run_id}-{name}")
    # Where DDP workers train, this process has no GPU of its own.
    device = torch.device("cpu") if plan.run.workers else device_of(plan.run)

    def measure(at: str) -> dict[str, float]:
        config, encoder, generator, _ = checkpoint.load_networks(at)
        found = quality(
            config,
            encoder.to(device),
            generator.to(device),
            plan.data_uri,
            Path(plan.cache_dir),
            seed=_SEED,
            limit=score_images or None,
        )
        return {f"valid/{part}": value for part, value in found.items()}

    def tell(scores: dict[str, float], images_seen: int, at: str) -> None:
        scores = {k: v for k, v in scores.items() if k.startswith("valid/")}
        tune.report({**scores, "images_seen": images_seen, "checkpoint": at})

    def report(event: Event) -> None:
        if "checkpoint" in event:  # after tracking, since a trial that is stopped ends in here
            tell(event["metrics"], event["images_seen"], event["checkpoint"])

    if before := checkpoint.latest(own.run_uri):
        tell(measure(before), checkpoint.read_facts(before)["images_seen"], before)
    # A trial that diverges has told its last score; it counts no more, and is not tried again.
    with contextlib.suppress(NonFiniteLossError):
        fit(own, show=report, measure=measure)
        return
    tune.report({objective.metric: objective.worst, "images_seen": 0, "diverged": True})


def trial_name(chosen: dict[str, Any], trial_id: str) -> str:
    """Return a trial's place in the sweep, as text, or Tune's name for it."""
    return _place(chosen["trial"]) if "trial" in chosen else trial_id


def _place(place: int) -> str:
    return f"{place:03d}"


def _folder_name(trial: Any) -> str:
    """Return the name of Tune's own folder of a trial."""
    return trial_name(trial.config, trial.trial_id)


def _search(plan: Plan, begun: dict[str, Any], options: Sweep) -> Any:
    """Run Tune to its end and return its results."""
    from pipelines.sweeps.report import Progress

    # With its dashboard: without it, a stopped trial's resources are never given back.
    with ray_session(dashboard=True), terminated_by_signal():
        require_resources(dataclasses.replace(plan.run, workers=options.workers), print)
        tuner = _tuner(plan, begun, options)
        # In the main thread Tune would take Ctrl-C over and return as if it had come to its end.
        Progress.cut.clear()
        return in_a_thread(tuner.fit, Progress.cut.set)


def _tuner(plan: Plan, begun: dict[str, Any], options: Sweep) -> Any:
    """Return Tune's own sweep: the one that was cut off, or a new one."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    from pipelines.sweeps.report import Progress

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # Progress tells what failed
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # Tune's own records, for --restore
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Progress says all there is
    length = plan.config.total_steps * plan.config.batch_size
    trials, objective = begun["trials"], space.Objective(**begun["objective"])
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
    if _has_records(storage.join(plan.run_uri, "tune")):
        return tune.Tuner.restore(
            f"{path}/tune", trainable, storage_filesystem=filesystem, resume_errored=True
        )
    # What a kill left of the first seconds, Tune cannot read. Our own checkpoints are elsewhere.
    storage.delete_folder(storage.join(plan.run_uri, "tune"))
    if trials is None:
        searched = space.space_of(plan.config, options.space)
        param_space, algorithm = {}, _optuna(searched, objective, options.search_seed)
    else:
        param_space = {"trial": tune.grid_search(list(range(len(trials))))}
        algorithm = None  # Tune's own, which goes through the grid and heeds the limit of trials
    count = options.samples if trials is None else len(trials)
    stopped = functools.partial(_end_stopped, plan.run_uri)
    return tune.Tuner(
        trainable,
        param_space=param_space,
        tune_config=tune.TuneConfig(
            metric=objective.metric,
            mode=objective.mode,
            num_samples=options.samples if trials is None else 1,
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
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[Progress(count, length, objective, trial_name, stopped)],
            failure_config=tune.FailureConfig(max_failures=2),  # of nodes: a trial goes on
        ),
    )


def _has_records(folder: str) -> bool:
    """Return whether Tune wrote down both of what it needs to go on: the sweep and its trials."""
    names = storage.list_names(folder)
    return "tuner.pkl" in names and any(n.startswith("experiment_state-") for n in names)


def _end_stopped(run_uri: str, name: str) -> None:
    """End the MLflow run of a trial that was stopped early."""
    tracking.end_stopped(f"{run_uri}-{name}", "stopped early by the sweep")


def _resources(options: Sweep) -> dict[str, Any]:
    """Return what the process of a trial takes; the workers of DDP take theirs themselves."""
    if options.workers > 1:
        return {"memory": 1}  # Tune refuses a trial that takes nothing at all
    return {"cpu": options.threads} | ({"gpu": 1} if options.gpu else {})


def _slots(options: Sweep) -> int | None:
    """Return how many trials fit the cluster at once; None leaves it to Tune and an autoscaler."""
    import ray

    # Not where trials have workers: one that waits for nodes would hold memory for its driver.
    if options.wait_for_nodes and options.workers == 1 and os.environ.get("RAY_ADDRESS"):
        return None
    there = ray.cluster_resources()
    slots = int(there.get("CPU", 1)) // (options.workers * options.threads)
    if options.gpu:
        slots = min(slots, int(there.get("GPU", 0)) // options.workers)
    return max(1, slots)


def _optuna(searched: space.Space, objective: space.Objective, seed: int) -> Any:
    """Return Optuna's search of a space."""
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    domains: dict[str, Any] = {}
    for name, domain in searched.items():
        if isinstance(domain, space.Choice):
            domains[name] = tune.choice(list(domain.values))
        elif domain.whole:
            domains[name] = tune.randint(int(domain.low), int(domain.high) + 1)
        else:
            domains[name] = tune.loguniform(domain.low, domain.high)
    return OptunaSearch(domains, metric=objective.metric, mode=objective.mode, seed=seed)


def _result(plan: Plan, begun: dict[str, Any], found: Any) -> dict[str, Any]:
    """Return what a sweep found, its trials in the order of their scores.

    Raises:
        UserError: not one trial came as far as a score.
    """
    objective = space.Objective(**begun["objective"])
    length = plan.config.total_steps * plan.config.batch_size
    ends = {Path(one.path).name: one for one in found}
    configs = {name: one.config or {} for name, one in ends.items()}
    if (drawn := begun["trials"]) is not None:  # a time budget may leave some that Tune never saw
        configs = {_place(place): settings for place, settings in enumerate(drawn)}
    trials = [
        _ended(plan, objective, length, name, configs[name], ends.get(name)) for name in configs
    ]
    trials.sort(key=lambda t: objective.rank(t[objective.metric]))
    best = trials[0]
    if best[objective.metric] is None:
        raise UserError(f"No trial of {plan.run_id} came as far as a score; see {plan.run_uri}.")
    return {
        "sweep_id": plan.run_id,
        "preset": plan.preset,
        "length": length,
        "objective": begun["objective"],
        "best_config": best["config"],
        "best_metric": best[objective.metric],
        "trials": trials,
        "report": storage.join(plan.run_uri, _PAGE),
        "command": _command(plan, best["config"]),
    }


def _ended(
    plan: Plan,
    objective: space.Objective,
    length: int,
    name: str,
    settings: dict[str, Any],
    end: Any,
) -> dict[str, Any]:
    """Return what came of a trial: of Tune's result, if there is one, and of the trial's journal.

    Ray forgets reports of a trial that ended just before a kill, and the journal's copy in storage
    may lack the last score of a trial that was stopped.
    """
    last = (end.metrics if end is not None else None) or {}
    diverged = bool(last.get("diverged"))
    folder = beside(plan, plan.config, f"{plan.run_id}-{name}").run_uri
    images, scores = tracking.curve(folder, objective.metric)
    if objective.metric in last and last["images_seen"] > max(images, default=0):
        images.append(last["images_seen"])
        scores.append(last[objective.metric])
    seen = max(images, default=0)
    if diverged:
        state = "diverged"
    elif end is not None and end.error:
        state = "failed"
    elif not scores:
        state = "not scored"
    else:
        state = "done" if seen >= length else "stopped early"
    parts = {k: float(v) for k, v in last.items() if k.startswith("valid/") and not diverged}
    return {
        "trial": name,
        "run_id": f"{plan.run_id}-{name}",
        "config": settings,
        **parts,
        objective.metric: scores[-1] if scores and not diverged else None,
        "images_seen": seen,
        "state": state,
        "checkpoint": last.get("checkpoint"),
        "curve": {"images_seen": images, objective.metric: scores},
    }


def _command(plan: Plan, best: dict[str, Any]) -> str:
    """Return the command that trains a configuration at full length, as its trial was trained."""
    default = flatten(preset_of(plan.preset))
    settings = {k: v for k, v in flatten(plan.config).items() if v != default[k]} | best
    settings.pop("total_images", None)
    run = plan.run
    settings["workers"] = max(1, run.workers)
    usual = Run()
    for name in ("threads", "precision", "loaders"):
        if getattr(run, name) != getattr(usual, name):
            settings[name] = getattr(run, name)
    words = ["python", "pipelines/train.py", plan.preset]
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    words += [f"--{name}" for name in ("gpu", "stream") if getattr(run, name)]
    if run.data and plan.data_uri:
        words += ["--data", plan.data_uri]
    if run.storage:
        words += ["--storage", plan.run_uri.rpartition("/")[0]]
    return shlex.join(words)


def _publish(plan: Plan, journal: tracking.Journal, result: dict[str, Any]) -> None:
    """Write a sweep's picture and page into storage, and under its MLflow run."""
    from pipelines.sweeps.report import render

    objective = space.Objective(**result["objective"])
    image, html = render(result, result["command"])
    with tempfile.TemporaryDirectory() as tmp:
        for name, content in (("sweep.png", image), (_PAGE, html.encode())):
            storage.write_bytes(storage.join(plan.run_uri, name), content)
            (Path(tmp) / name).write_bytes(content)
        best = {objective.metric: result["best_metric"]}
        tracking.add_report(journal, best, 0, Path(tmp))
    best = result["trials"][0]
    score = best[objective.metric]
    told = {f"best.{k}": str(v) for k, v in best["config"].items()}
    told |= {"best.run_id": best["run_id"], f"best.{objective.metric}": str(score)}
    told["mlflow.note.content"] = (
        f"{len(result['trials'])} trials of {result['length']:,} images; the best has "
        f"{objective.name} {score:.3f}. Train it with\n\n    {result['command']}"
    )
    tracking.set_tags(plan.tracking_uri, journal.run_id, told, journal)


def retrain(preset: str, config: Config, options: Sweep, result: dict[str, Any]) -> dict[str, Any]:
    """Train the best of a sweep at full length, evaluate and register it; return what came of it.

    Args:
        preset, config, options: of the sweep.
        result: that ``sweep`` returned.
    """
    from pipelines import evaluate, registry

    images = options.retrain_images or preset_of(preset).total_images
    best = override(config, {**result["best_config"], "total_images": images})
    run = _run(options, f"{result['sweep_id']}-best", options.workers)
    plan = resolve(preset, best, run)
    plan = dataclasses.replace(plan, tags={"sweep": result["sweep_id"]})
    trained = fit(plan, show=Display(plan))
    out = runs_dir() / "reports" / plan.run_id
    evaluated = evaluate.evaluate_checkpoint(trained["checkpoint"], data=plan.data_uri, out=out)
    registered = registry.register(trained["checkpoint"])
    return {**trained, "evaluation": evaluated, "report": str(out), "registered": registered}


def main(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Search as the command line says; print the table and the best; return the JSON object."""
    if options.restore:
        preset, config, options = restored(options)
    name = options.sweep_id or new_id(f"sweep-{preset}")
    options = dataclasses.replace(options, sweep_id=name)
    try:
        return _searched(preset, config, options)
    except (KeyboardInterrupt, Terminated) as stop:
        where = f" --storage {shlex.quote(options.storage)}" if options.storage else ""
        stopped(stop, f"--restore {name}{where}")


def _searched(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Search, tell what was found, and train the best if that is asked for."""
    result = sweep(preset, config, options)
    if options.dry_run:
        return result
    from pipelines.sweeps.report import table

    print("\n" + "\n".join(table(result)))
    print(f"\nPicture and table: {result['report']}")
    print(f"The best, at full length:\n  {result['command']}")
    if options.retrain:
        result = {**result, "retrained": retrain(preset, config, options, result)}
        for name in result["retrained"]["registered"]["names"]:
            print(f"Registered: models:/{name}@staging")
    return result


def command() -> None:
    """Run from the command line."""
    cli.run_preset(main, Sweep, PRESETS, default="ring")


if __name__ == "__main__":
    # By its full name, so that Ray's workers find these functions instead of unpickling copies.
    from pipelines.tune import command as named_command

    named_command()
