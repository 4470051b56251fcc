"""Prepare, train, evaluate and register one preset, as a Metaflow run that can be resumed.

    python pipelines/workflow.py run digits --total-images 300000
    python pipelines/workflow.py run mnist --source ../mnist --set optim.lr_g=1e-4
    python pipelines/workflow.py resume

``run`` and ``resume`` are checked here, so that a mistake ends in one sentence; every other verb
(``show``, ``card view evaluate``, ``argo-workflows create``) goes to Metaflow as it stands.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.build import build
from ivegan import cli, storage
from ivegan.config import PRESETS, Config, flatten, override, preset
from ivegan.errors import UserError
from pipelines import train

UI = "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"
"""MLflow opens on its pages for language models unless told otherwise."""
FLOW = Path(__file__).with_name("flow.py")
# Metaflow's time, and the step where a line comes from one.
_PREFIX = re.compile(r"\d{4}-\S+ [\d:.]+ (?:\[\w+/(\w+)/\w+(?: \(pid \d+\))?\] ?)?")
_TASK_CHATTER = {"Task is starting.", "Task finished successfully."}
_FLOW_CHATTER = re.compile(r"^Done!$|\btasks? (is|are)\b|\bsteps? (is|are|has not|have not)\b")
_TITLES = {"start": "prepare"}


@dataclass(frozen=True, kw_only=True)
class Workflow(cli.Options):
    """Run prepare, train, evaluate and register for one preset."""

    set: str = ""
    """Settings to change, ``optim.lr_g=1e-4,seed=3``; the dotted flags below do the same."""
    source: str | None = None
    """Raw data to build shards from, a folder or s3:// URI; digits need none."""
    data: str | None = None
    """Shards that are there already; runs/data/DATASET by default."""
    storage: str | None = None
    """Where run folders with checkpoints go; runs/checkpoints by default."""
    out: str | None = None
    """Where figures and reports go; runs/reports by default."""
    workers: int = 2
    """DDP workers of Ray Train; 0 is the plain loop, without Ray."""
    gpu: bool = False
    """Give each worker a GPU."""
    run_id: str | None = None
    """Name of the training run; made from preset and time by default."""


@dataclass(frozen=True, kw_only=True)
class Resume(cli.Options):
    """Go on with a workflow that stopped: finished steps are kept, the failed one runs again."""

    origin_run_id: str | None = None
    """Metaflow run to resume; the last one by default."""


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


def plan_of(flow: Any, data: str | None = None) -> train.Plan:
    """Return the training plan of a running flow."""
    config = preset(flow.preset)
    config = override(config, changes_of(flow.changes, config))
    run = train.Run(
        data=data or flow.data or None,
        storage=flow.storage or None,
        workers=flow.workers,
        gpu=flow.gpu,
        run_id=flow.run_name,
        resume=True,
    )
    return train.resolve(flow.preset, config, run)


def prepare(plan: train.Plan, source: str) -> str | None:
    """Return the URI of the shards, after building them where there is something to build from."""
    dataset = plan.config.dataset
    if plan.data_uri and (dataset == "digits" or source):
        build(dataset, source=source or None, out=plan.data_uri, workers=0)
    return plan.data_uri


def report_folder(flow: Any) -> str:
    """Return the local folder for a flow's figures and report."""
    return str(Path(flow.out or train.runs_dir() / "reports").absolute() / flow.run_name)


def main(name: str, config: Config, options: Workflow) -> dict[str, Any]:
    """Check the options, run the flow and return what ``--json`` prints."""
    config = override(config, changes_of(options.set, config))
    base = flatten(preset(name))
    changed = {k: v for k, v in flatten(config).items() if v != base[k]}
    data = options.data
    if data is None and not config.is_points and (options.source or config.dataset == "digits"):
        data = str(train.runs_dir() / "data" / config.dataset)
    run = train.Run(
        data=data,
        storage=options.storage,
        workers=options.workers,
        gpu=options.gpu,
        run_id=options.run_id,
    )
    plan = train.resolve(name, config, run)
    arguments = {
        "preset": name,
        "set": ",".join(f"{k}={v}" for k, v in changed.items()),
        "source": options.source and storage.absolute(options.source),
        "data": plan.data_uri,
        "storage": storage.absolute(options.storage) if options.storage else None,
        "out": options.out and str(Path(options.out).absolute()),
        "workers": str(options.workers),
        "gpu": str(options.gpu),
        "run-name": plan.run_id,
    }
    if options.dry_run:
        print("\n".join(f"{k}: {v}" for k, v in arguments.items() if v))
        return {k: v for k, v in arguments.items() if v}
    flags = [word for k, v in arguments.items() if v for word in (f"--{k}", v)]
    return _metaflow(["run", *flags])


def resume(options: Resume) -> dict[str, Any]:
    """Resume the last, or a named, workflow."""
    origin = ["--origin-run-id", options.origin_run_id] if options.origin_run_id else []
    if options.dry_run:
        return {"resume": options.origin_run_id or "last"}
    return _metaflow(["resume", *origin])


def _metaflow(arguments: list[str]) -> dict[str, Any]:
    """Run Metaflow in a process of its own and return the flow's result.

    Raises:
        SystemExit: with Metaflow's status, where a step failed.
    """
    _environment()
    with tempfile.TemporaryDirectory() as tmp:
        noted = Path(tmp) / "run_id"
        call = [sys.executable, str(FLOW), "--quiet", *arguments, "--run-id-file", str(noted)]
        with subprocess.Popen(
            call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            assert process.stdout is not None
            _pass_on(process.stdout)
        if status := process.returncode:
            print("The workflow stopped; `workflow.py resume` goes on from there.", file=sys.stderr)
            raise SystemExit(status)
        run_id = noted.read_text().strip()
    from metaflow.client.core import Run, namespace

    namespace(None)
    artifacts = Run(f"IveGanFlow/{run_id}").data
    assert artifacts is not None, "a run that ended well has its artifacts"
    result: dict[str, Any] = artifacts.result
    _tell(result)
    return {"metaflow_run": run_id, **result}


def _pass_on(lines: Iterable[str]) -> None:
    """Print what the steps print, under their names instead of behind Metaflow's prefix."""
    present = ""
    for line in lines:
        found = _PREFIX.match(line)
        text = (line[found.end() :] if found else line).rstrip()
        step = found[1] if found else None
        if not text or text in _TASK_CHATTER or (found and not step and _FLOW_CHATTER.search(text)):
            continue
        if step and step != present:
            present = step
            print(f"\n{_TITLES.get(step, step)}", flush=True)
        print(f"  {text}" if step else text, flush=True)


def _environment() -> None:
    """Give Metaflow a place for its records and a user's name, where neither is set."""
    where = "METAFLOW_DATASTORE_SYSROOT_LOCAL"
    if where not in os.environ and os.environ.get("METAFLOW_DEFAULT_DATASTORE", "local") == "local":
        os.environ[where] = str(train.runs_dir())
        # Whatever its value, Metaflow (2.19) then keeps cards with its other records below runs.
        os.environ.setdefault("METAFLOW_CARD_LOCALROOT", str(train.runs_dir()))
    # Metaflow wants a user's name, and does not take root for one, as containers have it.
    known = (os.environ.get(k) for k in ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER"))
    if not any(name and name != "root" for name in known):
        os.environ["METAFLOW_USER"] = "ivegan"
    for name, value in storage.environment().items():
        os.environ.setdefault(name, value)


def _tell(result: dict[str, Any]) -> None:
    """Print what was made, what it is worth, and where to look."""
    print(f"\nTrained {result['run_id']}: {result['images_seen']:,} images")
    for line in headline(result["evaluation"]):
        print(f"  {line}")
    print(f"Figures and numbers: {result['report']}")
    print(f"Runs and models:     make ui, then {UI}")
    for name in result["registered"].get("names", []):
        print(f"Registered:          models:/{name}@staging")


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
    _environment()
    raise SystemExit(
        subprocess.run([sys.executable, str(FLOW), *arguments], check=False).returncode
    )


if __name__ == "__main__":
    command()
