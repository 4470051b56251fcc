"""The definition of a sweep: its options, its search space and the settings of each trial.

``STORAGE/SWEEP_ID/sweep.json`` holds it before the first trial starts, so that after any stop the
same trial has the same settings, name and checkpoints.
"""

import dataclasses
import importlib.util
import json
from dataclasses import dataclass
from typing import Any, Literal

from ivegan import storage
from ivegan.config import Config, from_dict, override, to_dict
from ivegan.errors import UserError
from ivegan.storage import schema
from pipelines.paths import new_id, present, runs_uri
from pipelines.sweeps import space
from pipelines.sweeps.space import SearchObjective
from pipelines.training.plan import Execution, Plan, Run, resolve, run_of

FILE = "sweep.json"
_FREE = ("dry_run", "json", "restore", "resume", "sweep_id", "storage")  # options of one call


@dataclass(frozen=True, kw_only=True)
class Sweep(Execution):
    """Search the preset's space of learning rates and latent sizes.

    Settings that are not searched are those of the preset, and can be changed by their flags.
    """

    samples: int = 8
    """Number of trials; of a grid, number of repetitions."""
    space: str = ""
    """Settings to search beside or instead of the preset's: "optim.lr_g=1e-4..1e-2 seed=0,1
    model.z_dim=", a range, a choice, and a setting removed."""
    search: Literal["random", "grid", "optuna"] = "random"
    """How trials are chosen; a grid takes each combination of the choices, ranges are drawn."""
    score: str = ""
    """Score that trials are compared by, "valid/near" for instance; the preset's own by default."""
    search_seed: int = 0
    """Seed of the search; each trial's own seed is the setting ``seed``."""
    grace: int = 0
    """Images before a trial may be stopped early; 0 is a quarter of its length."""
    scores: int = 10
    """Number of scores of a trial, evenly over its length, the end included."""
    score_images: int = 2000
    """Validation images of a score, and five times as many train images; 0 is all."""
    reduction: int = 2
    """One of this many trials continues at each rung of the scheduler."""
    time_budget: float = 0.0
    """Seconds after which all trials are stopped; 0 is no limit."""
    max_concurrent: int = 0
    """Concurrent trials; 0 is as many as the cluster has CPUs for, or GPUs with --gpu, and with
    --wait-for-nodes as many as its autoscaler can make room for."""
    workers: int = 1
    """DDP workers of each trial; a single one runs in the trial's own process."""
    sweep_id: str | None = None
    """Name of the sweep; made from preset and time by default."""
    resume: bool = False
    """Continue the sweep of that --sweep-id if it exists, start it otherwise."""
    restore: str | None = None
    """Name of an interrupted sweep, to finish it with its own options. Only from storage that you
    trust: Ray's records of a sweep are pickles."""
    confirm: int = 0
    """Number of best trials to train again on fresh seeds; the best mean score wins. 0 is none."""
    confirm_seeds: int = 2
    """Fresh seeds of each confirmed trial."""
    retrain: bool = False
    """Train the best configuration at full length, evaluate it and register it as a candidate."""
    retrain_images: int = 0
    """Length of that training; 0 is the preset's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(samples=1, scores=1, workers=1, reduction=2, retrain_images=0)
        self.at_least(confirm=0, confirm_seeds=1, search_seed=0)
        self.at_least(score_images=0, grace=0, time_budget=0, max_concurrent=0)


@dataclass(frozen=True, kw_only=True)
class Definition:
    """The content of ``sweep.json``."""

    preset: str
    config: dict[str, Any]
    options: dict[str, Any]
    space: dict[str, str]
    objective: SearchObjective
    trials: list[dict[str, bool | int | float | str]] | None
    """Settings of each trial; None where Optuna proposes them."""
    dataset_hash: str = ""
    result: dict[str, Any] | None = None


def define(preset: str, config: Config, options: Sweep) -> Definition:
    """Return the definition of a new sweep.

    Raises:
        UserError: an unknown space or score, a trial that cannot be trained, or Optuna where it is
            not installed.
    """
    searched = space.space_of(config, options.space)
    trials = None
    if options.search != "optuna":
        grid = options.search == "grid"
        trials = space.draw(config, searched, options.samples, options.search_seed, grid=grid)
    elif importlib.util.find_spec("optuna") is None:
        raise UserError("--search optuna needs Optuna: pip install optuna.")
    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in _FREE}
    if options.confirm and "seed" in searched:
        raise UserError("--confirm needs fresh seeds, but --space searches seed: remove one.")
    if options.data:  # the same from any folder
        kept["data"] = storage.absolute(options.data)
    return Definition(
        preset=preset,
        config=to_dict(config),
        options=kept,
        space=searched,
        objective=space.objective_of(config, options.score),
        trials=trials,
    )


def read(sweep_uri: str) -> Definition | None:
    """Return the definition of an existing sweep, or None."""
    uri = storage.join(sweep_uri, FILE)
    if not storage.exists(uri):
        return None
    found = schema.read(storage.read_bytes(uri), Definition, uri)
    for trial in found.trials or ():
        from_dict(to_dict(override(from_dict(found.config), trial)))
    return found


def write(sweep_uri: str, definition: Definition) -> None:
    """Write ``sweep.json``."""
    content = json.dumps(dataclasses.asdict(definition), indent=2)
    storage.write_bytes(storage.join(sweep_uri, FILE), content.encode())


def check_same(existing: Definition, definition: Definition, name: str, options: Sweep) -> None:
    """Check that an existing sweep of this name may be continued.

    Raises:
        UserError: --resume is not given, or the definition differs.
    """
    if not options.resume:
        raise UserError(f"The sweep {name} exists: give --restore {name}, or another --sweep-id.")
    same = ("preset", "config", "space", "objective", "trials")
    changed = [k for k in same if getattr(existing, k) != getattr(definition, k)]
    if changed:
        raise UserError(
            f"The sweep {name} was started with another {' and '.join(changed)}: --restore {name} "
            "continues it with its own; or choose another --sweep-id."
        )


def restored(options: Sweep) -> tuple[str, Config, Sweep]:
    """Return preset, configuration and options of the sweep that --restore names.

    They are those of its start, except for --storage and for a retraining, which may be requested
    then or now.

    Raises:
        UserError: there is no such sweep.
    """
    assert options.restore, "a sweep to restore"
    folder = runs_uri(options.storage)
    existing = read(storage.join(folder, options.restore))
    if existing is None:
        raise UserError(f"There is no sweep {options.restore} in {folder}: check --storage.")
    now = {k: v for k, v in dataclasses.asdict(options).items() if k in _FREE}
    now |= {"restore": None, "sweep_id": options.restore, "resume": True}
    name = f"sweep.json of {options.restore}"
    own = schema.check({**existing.options, **now}, Sweep, name)
    restored = dataclasses.replace(
        own,
        data=options.data or present(own.data or "") or None,
        retrain=options.retrain or own.retrain,
        retrain_images=options.retrain_images or own.retrain_images,
    )
    return existing.preset, from_dict(existing.config), restored


def plan_of(preset: str, config: Config, options: Sweep) -> Plan:
    """Return the plan that all trials share."""
    run = run_of(
        options,
        run_id=options.sweep_id or new_id(f"sweep-{preset}"),
        workers=options.workers if options.workers > 1 else 0,
        save_every=-(-config.total_images // options.scores),
        keep=0 if options.workers > 1 else Run.keep,  # those workers do not wait for a score
        resume=True,
    )
    return resolve(preset, config, run)
