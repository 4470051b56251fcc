"""Prepare, sweep, train, evaluate and register one preset, as a Metaflow run that can be resumed.

    python pipelines/workflow.py run digits --total-images 300000
    python pipelines/workflow.py run mnist --source ../mnist --sweep-samples 8
    python pipelines/workflow.py --with timeout:minutes=600 --with retry:times=3 run ring
    python pipelines/workflow.py resume
    python pipelines/workflow.py --datastore s3://bucket/metaflow argo-workflows create --only-json

``run`` and ``resume`` check their options before Metaflow starts; each other verb (``show``, ``card
view evaluate``, ``argo-workflows create``) is passed to Metaflow. A finished step runs once:
``resume`` keeps it, and a new run with equal inputs finds the shards by their manifest, and the
finished sweep and training by their default ids, which are digests of their inputs.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from typing import Any

from ivegan import storage
from ivegan.config import PRESETS, Config, flatten, override, preset
from ivegan.errors import UserError
from pipelines import options as cli
from pipelines.flows import runner
from pipelines.flows.steps import Workflow, parse_changes
from pipelines.paths import mlflow_place, new_id, runs_dir, runs_uri
from pipelines.training.plan import resolve, run_of


@dataclass(frozen=True, kw_only=True)
class Resume(cli.Options):
    """Resume an interrupted workflow: finished steps are kept, the failed one runs again."""

    origin_run_id: str | None = None
    """Metaflow run to resume; the last one by default."""
    datastore: str | None = None
    """The --datastore of that run."""


def run(name: str, config: Config, options: Workflow) -> dict[str, Any]:
    """Check the options, run the flow and return the JSON object of ``--json``."""
    config = override(config, parse_changes(options.set, config))
    options = _absolute(name, config, options)
    if options.sweep_samples:
        from pipelines.sweeps import space

        space.space_of(config, options.sweep_space)
    elif options.sweep_images or options.sweep_space:
        raise UserError(
            "--sweep-images and --sweep-space need --sweep-samples, a number of trials."
        )
    base, default = flatten(preset(name)), dataclasses.asdict(Workflow())
    own = {k: v for k, v in dataclasses.asdict(options).items() if v != default[k]}
    parameter = {k: v for k, v in own.items() if k not in ("dry_run", "json", "set", "datastore")}
    parameter["workers"] = options.workers  # the default is another where a step may run
    parameter["set"] = {k: v for k, v in flatten(config).items() if v != base[k]}
    if options.dry_run:
        print(json.dumps({"preset": name, **parameter}, indent=2))
        return {"preset": name, **parameter}
    runner.prepare_environment(options.datastore)
    result = runner.run(["run", "--preset", name, "--options", json.dumps(parameter)])
    _print(result)
    return result


def _absolute(name: str, config: Config, options: Workflow) -> Workflow:
    """Return the options with absolute places, so that any folder can resume the run.

    Raises:
        UserError: a run that cannot be trained, --anew for an existing run, or a missing place.
    """
    data = options.data
    if data is None and not config.is_points and (options.source or config.dataset == "digits"):
        data = str(runs_dir() / "data" / config.dataset)
    plan = resolve(name, config, run_of(options, data=data, run_id=options.run_id))
    if options.anew and storage.exists(storage.join(plan.run_uri, "run.json")):
        raise UserError(f"--anew begins a run, but {plan.run_id} exists: choose another --run-id.")
    source = options.source
    if source and source != "download" and "://" not in source:
        source = storage.absolute(source)
    return dataclasses.replace(
        options,
        source=source,
        data=plan.data_uri,
        storage=runs_uri(options.storage),
        out=storage.absolute(options.out or runs_dir() / "reports"),
        run_id=options.run_id or (new_id(name) if options.anew else None),
    )


def resume(options: Resume) -> dict[str, Any]:
    """Resume the last, or a named, workflow."""
    runner.prepare_environment(options.datastore)
    origin = runner.origin_of(options.origin_run_id)
    if options.dry_run:
        print(f"the Metaflow run {origin} would be resumed")
        return {"resume": origin}
    result = runner.run(["resume", "--origin-run-id", origin])
    _print(result)
    return result


def _print(result: dict[str, Any]) -> None:
    """Print what was trained, its most important numbers and where to look."""
    from ivegan.evaluation.report import headline

    how = "Reused" if result["reused"] else "Trained"
    print(f"\n{how} {result['run_id']}: {result['images_seen']:,} images")
    for line in cli.aligned(headline(result["evaluation"]), right=(1,)):
        print(f"  {line}")
    print(f"Figures and numbers: {result['report']}")
    print(f"Runs and models:     {mlflow_place()}")
    for name in result["registered"].get("names", []):
        print(f"Registered:          models:/{name}@{result['registered']['stage']}")


def command() -> None:
    """Run from the command line; ``--datastore`` and ``--with`` may stand before the verb."""
    arguments, datastore = sys.argv[1:], None
    while len(arguments) > 1 and arguments[0] in ("--datastore", "--with"):
        flag, value, *arguments = arguments
        if flag == "--with":
            runner.add_decorator(value)
        else:
            datastore = value
    if datastore and arguments[:1] in (["run"], ["resume"]):
        arguments += ["--datastore", datastore]
    if arguments[:1] == ["run"]:
        cli.run_preset(run, Workflow, PRESETS, default="digits", argv=arguments[1:])
    if arguments[:1] in ([], ["-h"], ["--help"], ["resume"]):  # run, above, has a preset's options
        cli.run_verb(
            {"run": (lambda _: None, Workflow), "resume": (resume, Resume)}, argv=arguments
        )
    try:
        runner.prepare_environment(datastore)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(runner.call(arguments))


if __name__ == "__main__":
    command()
