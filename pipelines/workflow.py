"""Prepare, sweep, train, evaluate and register one preset, as a Metaflow run that can be resumed.

    python pipelines/workflow.py run digits --total-images 300000
    python pipelines/workflow.py run mnist --source ../mnist --sweep-samples 8
    python pipelines/workflow.py resume
    python pipelines/workflow.py --datastore s3://bucket/metaflow argo-workflows create --only-json

``run`` and ``resume`` are checked here, so that a mistake ends in one sentence; every other verb
(``show``, ``card view evaluate``, ``argo-workflows create``) goes to Metaflow as it stands.

A step that ended is done once: ``resume`` keeps it, and a new run with equal inputs finds the
shards by their manifest, and the finished sweep and training through ``pipelines.finished``.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from data_prep.build import build
from ivegan import storage
from ivegan.config import PRESETS, Config, flatten, override, preset
from ivegan.errors import UserError
from ivegan.step import NonFiniteLossError
from pipelines import options as cli
from pipelines.flows import limits
from pipelines.paths import runs_dir
from pipelines.progress import Display
from pipelines.training.fit import fit
from pipelines.training.plan import Plan, Run, beside, check_data, git_commit, resolve

T = TypeVar("T")
UI = "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
"""MLflow opens on its pages for language models unless told otherwise."""
FLOW = Path(__file__).parent / "flows" / "flow.py"
NAME = "IveGanFlow"
_MISTAKE = "IVEGAN_MISTAKE"  # the file where a step's process leaves a user's mistake
# Metaflow's time, and the step where a line comes from one.
_PREFIX = re.compile(r"\d{4}-\S+ [\d:.]+ (?:\[\w+/(\w+)/\w+(?: \(pid \d+\))?\] ?)?")
_TASK_CHATTER = {"Task is starting.", "Task finished successfully."}
_FLOW_CHATTER = re.compile(r"^Done!$|\btasks? (is|are)\b|\bsteps? (is|are|has not|have not)\b")
_STARTING = re.compile(r"Workflow starting \(run-id (\S+?)\)")
_TITLES = {"start": "prepare"}
# What a sweep shares with a training.
_SWEPT = ("preset", "config_hash", "dataset_hash", "device", "threads", "precision", "stream")


@dataclass(frozen=True, kw_only=True)
class Workflow(cli.Options):
    """Run prepare, perhaps a sweep, train, evaluate and register for one preset."""

    set: str = ""
    """Settings to change, ``optim.lr_g=1e-4,seed=3``; the dotted flags below do the same."""
    source: str | None = None
    """Raw data to build shards from, a folder or s3:// URI; digits need none."""
    data: str | None = None
    """Shards that are there already; runs/data/DATASET by default."""
    storage: str | None = None
    """Where run folders with checkpoints go; runs/checkpoints by default."""
    out: str | None = None
    """Where figures and reports go, a folder or s3:// URI; runs/reports by default."""
    datastore: str | None = None
    """Where Metaflow keeps what steps hand on, a folder or s3:// URI; runs/ by default."""
    workers: int = 2
    """DDP workers of Ray Train; 0 is the plain loop, without Ray."""
    threads: int = 1
    """CPU threads of each worker."""
    gpu: bool = False
    """Give each worker a GPU."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in while they are trained."""
    stream: bool = False
    """Read shards over and over, for data too large to keep decoded on each node."""
    wait_for_nodes: float = 0.0
    """Seconds to wait for a cluster's autoscaler to add what is missing."""
    run_id: str | None = None
    """Name of the training run; made from preset and time by default."""
    sweep_samples: int = 0
    """Trials of a sweep before the training, which takes over the best settings; 0 is no sweep."""
    sweep_images: int = 0
    """Images of each trial; 0 is as many as the training's."""
    sweep_space: str = ""
    """What to search, as tune.py's --space takes it; the preset's own space by default."""
    anew: bool = False
    """Sweep and train even if a finished sweep and training with equal inputs are in storage."""
    limits: str = ""
    """Minutes that a step may take, and how often a failed one is tried again, where that is not
    7 days and once: "train=600,evaluate=30,retries=2"."""


@dataclass(frozen=True, kw_only=True)
class Resume(cli.Options):
    """Go on with a workflow that stopped: finished steps are kept, the failed one runs again."""

    origin_run_id: str | None = None
    """Metaflow run to resume; the last one by default."""
    datastore: str | None = None
    """The --datastore of that run."""
    limits: str = ""
    """As for run, whose --limits are not kept."""


def changes_of(text: str, config: Config) -> dict[str, Any]:
    """Return the settings that ``a.b=1,c=2`` names, each of its setting's type.

    Raises:
        UserError: an unknown setting, or a value that is not of its type.
    """
    known, out = flatten(config), {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--set {part!r} needs a value: write {part}=VALUE.")
        override(config, {name: known.get(name)})  # says so where there is no such setting
        kind = type(known[name])
        try:
            out[name] = value in ("True", "true", "1") if kind is bool else kind(value)
        except ValueError as error:
            raise UserError(f"--set {name} takes a {kind.__name__}, but got {value!r}.") from error
    return out


def plan_of(flow: Any) -> Plan:
    """Return the training plan of a running flow, with what its earlier steps found."""
    config = preset(flow.preset)
    config = override(config, changes_of(flow.changes, config))
    searched = getattr(flow, "searched", {})
    run = Run(
        data=getattr(flow, "data_uri", flow.data) or None,
        storage=flow.storage or None,
        workers=flow.workers,
        threads=flow.threads,
        gpu=flow.gpu,
        precision=flow.precision,
        stream=flow.stream,
        wait_for_nodes=flow.wait_for_nodes,
        run_id=flow.run_id,
        resume=True,
    )
    config = override(config, searched.get("best_config", {}))
    tags = {"sweep": searched["sweep_id"]} if searched else {}
    return dataclasses.replace(resolve(flow.preset, config, run), tags=tags)


def prepare(plan: Plan, source: str) -> str | None:
    """Return the URI of the shards, after building them where there is something to build from."""
    dataset = plan.config.dataset
    if plan.data_uri is None:
        print("points are drawn as they are used")
    elif dataset == "digits" or source:
        print(f"shards of {dataset} in {plan.data_uri}")
        built = build(dataset, source=source or None, out=plan.data_uri, workers=0)
        if built["skipped"] == built["shards"]:
            print("they were there already, from equal raw data and settings")
    else:
        print(f"shards in {plan.data_uri}")
    return plan.data_uri


def sweep(flow: Any, plan: Plan) -> dict[str, Any]:
    """Return what the sweep of a running flow found, without the courses of its trials.

    The sweep of an earlier attempt is finished, and one with equal inputs that is finished in
    storage is taken as it is.
    """
    from pipelines import tune
    from pipelines.flows import finished
    from pipelines.sweeps import space

    images = flow.sweep_images or plan.config.total_images
    config = override(plan.config, {"total_images": images})
    plan = beside(plan, config, f"{plan.run_id}-sweep")
    objective = space.objective_of(config)
    inputs = {
        # A trial has one worker, whatever the training has.
        **{k: v for k, v in finished.inputs_of(plan, check_data(plan)).items() if k in _SWEPT},
        "kind": "sweep",
        "samples": flow.sweep_samples,
        "space": space.spelled(space.space_of(config, flow.sweep_space)),
        "score": objective.metric,
    }
    found = None if flow.anew else _reusable(lambda: finished.find(plan, inputs))
    name = found["outcome"]["sweep_id"] if found else plan.run_id
    if found:
        print(f"reusing the finished sweep {name} of equal settings; --anew searches again")
    else:
        print(f"sweep {name}: {flow.sweep_samples} trials of {images:,} images")
    options = tune.Sweep(
        samples=flow.sweep_samples,
        space=flow.sweep_space,
        threads=flow.threads,
        gpu=flow.gpu,
        precision=flow.precision,
        wait_for_nodes=flow.wait_for_nodes,
        data=plan.data_uri,
        stream=flow.stream,
        storage=plan.run_uri.rpartition("/")[0],
        sweep_id=name,
        resume=True,
    )
    result = tune.sweep(plan.preset, config, options)
    finished.note(plan, inputs, {"sweep_id": name})
    told = ", ".join(f"{k} {v}" for k, v in result["best_config"].items())
    score = f"{objective.name} {result['best_metric']:.3f}"
    print(f"the best of {len(result['trials'])} has {score}: {told}")
    trials = [{k: v for k, v in trial.items() if k != "curve"} for trial in result["trials"]]
    kept = ("best_config", "best_metric", "parent_run_id")
    return {"sweep_id": name, **{k: result[k] for k in kept}, "trials": trials}


def sweep_picture(plan: Plan, sweep_id: str) -> bytes | None:
    """Return the PNG that a sweep left in storage, or None."""
    at = storage.join(plan.run_uri.rpartition("/")[0], sweep_id, "sweep.png")
    return storage.read_bytes(at) if storage.exists(at) else None


def sweep_table(searched: dict[str, Any]) -> tuple[list[list[Any]], list[str]]:
    """Return (rows, headers) of a sweep's trials, in the order that the sweep gave them."""
    trials = searched["trials"]
    names = [k for k in trials[0] if k not in ("config", "checkpoint", "run_id")]
    settings = list(searched["best_config"])
    rows = [[t.get(k) for k in names] + [t["config"].get(k) for k in settings] for t in trials]
    return rows, names + settings


def train_or_reuse(flow: Any, plan: Plan) -> dict[str, Any]:
    """Return what ``fit`` does, and ``reused``: whether another run's result was taken.

    Raises:
        UserError: as for ``fit``, and a training that diverged, as it would again.
    """
    from pipelines.flows import finished

    inputs = finished.inputs_of(plan, check_data(plan))
    found = None if flow.anew else _reusable(lambda: finished.find_training(plan, inputs))
    if found:
        result = found["outcome"]
        if result["run_id"] == plan.run_id:  # an attempt before ended all but this step
            print(f"{plan.run_id} is trained already: {result['checkpoint']}")
            return {**result, "reused": False}
        print(f"reusing {result['checkpoint']}: the run {result['run_id']} had equal settings")
        if found["git_commit"] != git_commit():
            print(f"its code was {found['git_commit']}, this is {git_commit()}")
        print("--anew trains again")
        return {**result, "reused": True}
    print(f"training {plan.run_id}: {plan.config.total_steps:,} steps of {plan.config.batch_size}")
    with contextlib.closing(Display(plan)) as display:
        try:
            result = fit(plan, show=display)
        except NonFiniteLossError as error:
            raise UserError(str(error)) from error
    finished.note_training(plan, inputs, result)
    return {**result, "reused": False}


def _reusable(find: Callable[[], T | None]) -> T | None:
    """Return what is found; where it is spoilt, say so and return None."""
    try:
        return find()
    except storage.Unavailable:
        raise
    except UserError as error:
        print(f"what was finished with equal inputs cannot be used: {error}")
        return None


def report_folder(flow: Any) -> str:
    """Return where figures and report of a flow's training go."""
    out = flow.out or str(runs_dir() / "reports")
    return storage.join(storage.absolute(out), flow.trained["run_id"])


@contextlib.contextmanager
def folder_for(uri: str) -> Iterator[Path]:
    """Yield a local folder to write to: the one that is meant, or one whose files go there."""
    if storage.is_local(uri):
        yield Path(uri)
        return
    with tempfile.TemporaryDirectory() as tmp:
        yield Path(tmp)
        storage.upload_folder(tmp, uri)


def note_mistake(mistake: UserError) -> None:
    """Leave a mistake that a step met for the command to tell, or tell it where there is none."""
    if where := os.environ.get(_MISTAKE):
        Path(where).write_text(str(mistake))
    else:
        print(mistake, file=sys.stderr)


def main(name: str, config: Config, options: Workflow) -> dict[str, Any]:
    """Check the options, run the flow and return what ``--json`` prints."""
    limits.parse(limits.text(options.limits))
    _need_places(config, options)
    config = override(config, changes_of(options.set, config))
    base = flatten(preset(name))
    changed = {k: v for k, v in flatten(config).items() if v != base[k]}
    data = options.data
    if data is None and not config.is_points and (options.source or config.dataset == "digits"):
        data = str(runs_dir() / "data" / config.dataset)
    run = Run(
        data=data,
        storage=options.storage,
        workers=options.workers,
        threads=options.threads,
        gpu=options.gpu,
        run_id=options.run_id,
    )
    plan = resolve(name, config, run)
    _check_sweep(config, options)
    if options.anew and storage.exists(storage.join(plan.run_uri, "run.json")):
        raise UserError(f"--anew begins a run, but {plan.run_id} exists: choose another --run-id.")
    # Every place is absolute, so that the run can be resumed from another folder.
    arguments = {
        "preset": name,
        "set": ",".join(f"{k}={v}" for k, v in changed.items()),
        "source": options.source and _source(options.source),
        "data": plan.data_uri,
        "storage": plan.run_uri.rpartition("/")[0],
        "out": storage.absolute(options.out or runs_dir() / "reports"),
        "workers": str(options.workers),
        "threads": str(options.threads),
        "gpu": str(options.gpu),
        "precision": options.precision,
        "stream": str(options.stream),
        "wait-for-nodes": str(options.wait_for_nodes),
        "run-name": plan.run_id,
        "sweep-samples": str(options.sweep_samples),
        "sweep-images": str(options.sweep_images),
        "sweep-space": options.sweep_space,
        "anew": str(options.anew),
    }
    if options.dry_run:
        print("\n".join(f"{k}: {v}" for k, v in arguments.items() if v))
        return {k: v for k, v in arguments.items() if v}
    flags = [word for k, v in arguments.items() if v for word in (f"--{k}", v)]
    return _metaflow(["run", *flags], options)


def _source(text: str) -> str:
    """Return raw data's place made absolute; the web and "download" stay as they are."""
    return text if text == "download" or "://" in text else storage.absolute(text)


def _need_places(config: Config, options: Workflow) -> None:
    """See that everything has a place outside a Ray job's throw-away copy of its folder."""
    try:
        runs_dir()
    except UserError as error:
        missing = [f"--{k}" for k in ("storage", "out", "datastore") if not getattr(options, k)]
        if not options.data and not config.is_points:
            missing.append("--data")
        if missing:
            raise UserError(
                "This job runs in a throw-away copy of its working directory: set "
                f"{', '.join(missing)} and MLFLOW_TRACKING_URI to places outside it."
            ) from error


def _check_sweep(config: Config, options: Workflow) -> None:
    """See that a sweep can be made as it is asked for."""
    options.at_least(sweep_samples=0, sweep_images=0)
    if options.sweep_samples:
        from pipelines.sweeps import space

        space.space_of(config, options.sweep_space)
    elif options.sweep_images or options.sweep_space:
        raise UserError(
            "--sweep-images and --sweep-space need --sweep-samples, a number of trials."
        )


def resume(options: Resume) -> dict[str, Any]:
    """Resume the last, or a named, workflow."""
    limits.parse(limits.text(options.limits))
    _environment(options.datastore)
    origin = options.origin_run_id or _latest()
    if options.dry_run:
        return {"resume": origin}
    return _metaflow(["resume", "--origin-run-id", origin], options)


def _latest() -> str:
    """Return the id of the last Metaflow run of the datastore.

    Raises:
        UserError: there is none.
    """
    where = _latest_note()
    if not storage.exists(where):
        raise UserError(
            f"There is no workflow to resume in {where.rpartition('/')[0]}: start one with run, "
            "or give the --datastore that it was started with."
        )
    return storage.read_bytes(where).decode().strip()


def _latest_note() -> str:
    """Return the file that holds the id of the last run; Metaflow keeps one, but not in S3."""
    if os.environ.get("METAFLOW_DEFAULT_DATASTORE") == "s3":
        return storage.join(os.environ["METAFLOW_DATASTORE_SYSROOT_S3"], NAME, "latest_run")
    return f"{os.environ['METAFLOW_DATASTORE_SYSROOT_LOCAL']}/.metaflow/{NAME}/latest_run"


def _metaflow(arguments: list[str], options: Workflow | Resume) -> dict[str, Any]:
    """Run Metaflow in a process of its own and return the flow's result.

    Raises:
        UserError: a step met a mistake of the user's.
        SystemExit: with Metaflow's status, where a step failed.
    """
    _environment(options.datastore)
    with tempfile.TemporaryDirectory() as tmp:
        mistake = Path(tmp) / "mistake"
        process = subprocess.Popen(
            [sys.executable, str(FLOW), "--quiet", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={
                **os.environ,
                _MISTAKE: str(mistake),
                limits.VARIABLE: limits.text(options.limits),
            },
        )
        with process:
            assert process.stdout is not None
            run_id = _pass_on(process.stdout)
        if mistake.exists():
            raise UserError(mistake.read_text())
        if status := process.returncode:
            print("The workflow stopped; `workflow.py resume` goes on from there.", file=sys.stderr)
            raise SystemExit(status)
    from metaflow.client.core import Run, namespace

    namespace(None)
    artifacts = Run(f"{NAME}/{run_id}").data
    assert artifacts is not None, "a run that ended well has its artifacts"
    result: dict[str, Any] = artifacts.result
    _tell(result)
    return {"metaflow_run": run_id, **result}


def _pass_on(lines: Iterable[str]) -> str:
    """Print what the steps print, under their names instead of behind Metaflow's prefix.

    Returned is the id of the run, which is noted in S3 as soon as it is known.
    """
    present = run_id = ""
    for line in lines:
        found = _PREFIX.match(line)
        text = (line[found.end() :] if found else line).rstrip()
        step = found[1] if found else None
        if not text or text in _TASK_CHATTER or (found and not step and _FLOW_CHATTER.search(text)):
            continue
        if starting := _STARTING.search(text):
            run_id = starting[1]
            if not storage.is_local(note := _latest_note()):
                storage.write_bytes(note, run_id.encode())
        if step and step != present:
            present = step
            print(f"\n{_TITLES.get(step, step)}", flush=True)
        print(f"  {text}" if step else text, flush=True)
    return run_id


def _environment(datastore: str | None) -> None:
    """Give Metaflow a place for its records and a user's name, where neither is set."""
    where = "METAFLOW_DATASTORE_SYSROOT_LOCAL"
    if datastore:
        place = storage.absolute(datastore)
        kind = "local" if storage.is_local(place) else "s3"
        os.environ["METAFLOW_DEFAULT_DATASTORE"] = kind
        os.environ[f"METAFLOW_DATASTORE_SYSROOT_{kind.upper()}"] = place
    in_s3 = os.environ.get("METAFLOW_DEFAULT_DATASTORE", "local") == "s3"
    if in_s3 and not os.environ.get("METAFLOW_DATASTORE_SYSROOT_S3"):
        raise UserError("METAFLOW_DEFAULT_DATASTORE is s3: give --datastore s3://BUCKET/FOLDER.")
    if where not in os.environ:
        with contextlib.suppress(UserError):  # in a throw-away copy nothing may be kept
            os.environ[where] = str(runs_dir())
        # Beside a datastore in S3 nothing is lost with what Metaflow keeps here.
        os.environ.setdefault(where, str(Path(tempfile.gettempdir()) / f"ivegan-{os.getuid()}"))
    if not in_s3:
        # Whatever its value, Metaflow (2.19) then keeps cards with its other records.
        os.environ.setdefault("METAFLOW_CARD_LOCALROOT", os.environ[where])
    # Metaflow wants a user's name, and does not take root for one, as containers have it.
    known = (os.environ.get(k) for k in ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER"))
    if not any(name and name != "root" for name in known):
        os.environ["METAFLOW_USER"] = "ivegan"
    for name, value in storage.environment().items():
        os.environ.setdefault(name, value)


def _tell(result: dict[str, Any]) -> None:
    """Print what was made, what it is worth, and where to look."""
    how = "Reused" if result["reused"] else "Trained"
    print(f"\n{how} {result['run_id']}: {result['images_seen']:,} images")
    for line in headline(result["evaluation"]):
        print(f"  {line}")
    print(f"Figures and numbers: {result['report']}")
    print(f"Runs and models:     make ui, then {UI}")
    for name in result["registered"].get("names", []):
        print(f"Registered:          models:/{name}@{result['registered']['stage']}")


def headline(metrics: dict[str, float]) -> list[str]:
    """Return the three numbers that say most, each with its meaning."""
    told = {
        "eval/same_class": "{:.1%} of held-out images keep their class through E and G "
        "(chance {chance:.0%})",
        "eval/one_nn": "{:.1%} of held-out codes have a nearest neighbour of their own class",
        "eval/linear_probe": "{:.1%} of held-out codes are classified right by a linear probe",
        "eval/modes": "{:.0f} modes of the mixture are reached",
        "eval/high_quality": "{:.1%} of samples lie within 3 standard deviations of a mode",
        "eval/reverse_kl": "{:.4f} nats between the modes' shares and equal shares",
    }
    chance = metrics.get("eval/same_class_shuffled", 0.1)
    return [text.format(metrics[k], chance=chance) for k, text in told.items() if k in metrics]


def command() -> None:
    """Run from the command line."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["run"]:
        cli.run_preset(main, Workflow, PRESETS, default="digits", argv=arguments[1:])
    if arguments[:1] in ([], ["-h"], ["--help"], ["resume"]):
        cli.run_verb({"resume": (resume, Resume)}, argv=arguments)
    raise SystemExit(_other_verb(arguments))


def _other_verb(arguments: list[str]) -> int:
    """Let Metaflow do what it does, and return its status; ``--datastore URI`` may come first."""
    datastore = None
    if arguments[0] == "--datastore" and len(arguments) > 1:
        _, datastore, *arguments = arguments
    try:
        _environment(datastore)
        limits.arguments()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return subprocess.run([sys.executable, str(FLOW), *arguments], check=False).returncode


if __name__ == "__main__":
    command()
