"""The work of a workflow's steps: places and ids pass between them, never models."""

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any

from data_prep.building import build
from ivegan import checkpoint, storage
from ivegan.config import Config, config_hash, override, preset
from ivegan.errors import UserError
from ivegan.step import NonFiniteLossError
from ivegan.storage.digest import digest
from pipelines import record as records
from pipelines.paths import runs_dir
from pipelines.progress import Display
from pipelines.sweeps import definition, driver, space
from pipelines.training.fit import check_resumable, fit, result_of
from pipelines.training.plan import Execution, Plan, beside, check_data, resolve, run_of, shared


@dataclass(frozen=True, kw_only=True)
class Workflow(Execution):
    """Run prepare, an optional sweep, train, evaluate and register for one preset."""

    set: str = ""
    """Settings to change, ``optim.lr_g=1e-4,seed=3``; the dotted flags below do the same."""
    source: str | None = None
    """Raw data to build shards from, a folder or s3:// URI; digits need none."""
    out: str | None = None
    """Folder or s3:// URI of figures and reports; runs/reports by default."""
    datastore: str | None = None
    """Folder or s3:// URI of Metaflow's records; runs/ by default."""
    run_id: str | None = None
    """Name of the training run; by default made from a digest of its inputs, so that a finished
    equal run is reused."""
    sweep_samples: int = 0
    """Trials of a sweep before the training, which uses the best settings; 0 is no sweep."""
    sweep_images: int = 0
    """Images of each trial; 0 is as many as the training's."""
    sweep_space: str = ""
    """Settings to search, as tune.py's --space; the preset's own space by default."""
    anew: bool = False
    """Sweep and train even if a finished equal sweep and training are in storage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(sweep_samples=0, sweep_images=0)


def plan_of(flow: Any) -> Plan:
    """Return the training plan of a running flow, with the results of its earlier steps."""
    options = options_of(flow.options)
    sweep_result = getattr(flow, "searched", None) or {}
    config = override(preset(flow.preset), flow.options.get("set") or {})
    config = override(config, sweep_result.get("best_config", {}))
    data = getattr(flow, "data_uri", options.data) or None
    run = run_of(options, data=data, run_id=options.run_id, resume=True)
    tags = {"sweep": sweep_result["sweep_id"]} if sweep_result else {}
    return dataclasses.replace(resolve(flow.preset, config, run), tags=tags)


def options_of(parameter: dict[str, Any]) -> Workflow:
    """Return the options that a flow's JSON parameter holds, without its settings."""
    try:
        return Workflow(**{k: v for k, v in parameter.items() if k != "set"})
    except TypeError as error:
        raise UserError(f"{error}: check --options.") from error


def parse_changes(text: str, config: Config) -> dict[str, Any]:
    """Return the settings that ``a.b=1,c=2`` changes, each of its setting's type.

    Raises:
        UserError: an unknown setting, or a value that it cannot take.
    """
    changes = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--set {part!r} needs a value: write {part}=VALUE.")
        changes[name] = space.typed(config, name, value)
    return changes


def prepare(plan: Plan, source: str | None) -> str | None:
    """Build the shards where a source is given, and return their URI."""
    dataset = plan.config.dataset
    if plan.data_uri is None:
        print("points are sampled during training")
    elif dataset == "digits" or source:
        print(f"shards of {dataset} in {plan.data_uri}")
        built = build(dataset, source=source or None, out=plan.data_uri, workers=0)
        if built["skipped"] == built["shards"]:
            print("they exist already, from equal raw data and settings")
    else:
        print(f"shards in {plan.data_uri}")
    return plan.data_uri


def sweep(flow: Any, plan: Plan) -> dict[str, Any]:
    """Run or reuse the sweep of a running flow, and return its result without the curves.

    Its id is a digest of its inputs: an interrupted one is continued, a finished one returned.
    """
    options = options_of(flow.options)
    images = options.sweep_images or plan.config.total_images
    config = override(plan.config, {"total_images": images})
    sweep_id = f"{options.run_id}-sweep" if options.run_id and options.anew else None
    if sweep_id is None:
        inputs = inputs_of(dataclasses.replace(plan, config=config))
        inputs["world_size"] = 1  # of a trial
        inputs["sweep"] = [options.sweep_samples, space.space_of(config, options.sweep_space)]
        sweep_id = f"sweep-{plan.preset}-{digest(inputs)[:12]}"
    sweep_options = definition.Sweep(
        **{**shared(options), "data": plan.data_uri, "workers": 1},
        samples=options.sweep_samples,
        space=options.sweep_space,
        sweep_id=sweep_id,
        resume=True,
    )
    print(f"sweep {sweep_id}: {options.sweep_samples} trials of {images:,} images")
    result = driver.sweep(plan.preset, config, sweep_options)
    best = ", ".join(f"{k} {v}" for k, v in result["best_config"].items())
    score = f"{result['objective']['metric']} {result['best_metric']:.3f}"
    print(f"the best of {len(result['trials'])} has {score}: {best}")
    trials = [{k: v for k, v in trial.items() if k != "curve"} for trial in result["trials"]]
    kept = ("best_config", "best_metric", "parent_run_id", "figure")
    return {"sweep_id": sweep_id, **{k: result[k] for k in kept}, "trials": trials}


def sweep_table(result: dict[str, Any]) -> tuple[list[list[Any]], list[str]]:
    """Return (rows, headers) of a sweep's trials, in the order of the sweep."""
    trials = result["trials"]
    names = [k for k in trials[0] if k not in ("config", "checkpoint", "run_id")]
    settings = list(result["best_config"])
    rows = [[t.get(k) for k in names] + [t["config"].get(k) for k in settings] for t in trials]
    return rows, names + settings


def inputs_of(plan: Plan) -> dict[str, Any]:
    """Return all inputs that decide the result of a training."""
    return {
        "preset": plan.preset,
        "config_hash": config_hash(plan.config),
        "dataset_hash": check_data(plan),
        "world_size": max(1, plan.run.workers),
        "threads": plan.run.threads,
        "device": "cuda" if plan.run.gpu else "cpu",
        **{name: getattr(plan.run, name) for name in records.HOW},
    }


def train(flow: Any, plan: Plan) -> dict[str, Any]:
    """Train, continue an interrupted training, or return the result of a finished equal one.

    Returns:
        the result of ``fit``, and ``reused``: whether the run was finished already.
    """
    options = options_of(flow.options)
    if not options.run_id:
        plan = beside(plan, plan.config, f"{plan.preset}-{digest(inputs_of(plan))[:12]}")
    if _is_finished(plan):
        check_resumable(plan, check_data(plan))
        finished = result_of(plan.run_uri)
        print(f"{plan.run_id} is trained already: {finished['checkpoint']}")
        return {**finished, "reused": True}
    print(f"training {plan.run_id}: {plan.config.total_steps:,} steps of {plan.config.batch_size}")
    with contextlib.closing(Display(plan)) as display:
        try:
            result = fit(plan, show=display)
        except NonFiniteLossError as error:  # as it would again
            raise UserError(str(error)) from error
    return {**result, "reused": False}


def _is_finished(plan: Plan) -> bool:
    """Return whether a run has ended with all images of the plan seen."""
    last = checkpoint.latest(plan.run_uri)
    if last is None or records.read_record(plan.run_uri).status != "FINISHED":
        return False
    return checkpoint.read_metadata(last)["images_seen"] == plan.images


def reports_uri(flow: Any) -> str:
    """Return the folder of figures and reports."""
    return storage.absolute(options_of(flow.options).out or runs_dir() / "reports")
