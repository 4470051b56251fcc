"""Compute the paper's tables beside baselines, and print floor, ours and published numbers.

    python pipelines/reproduce.py --quick                  a reduced table, minutes on two cores
    python pipelines/reproduce.py digits --seeds 0 1       cells of one task that are missing
    python pipelines/reproduce.py mnist-z16 --data runs/data --rows plus vae
    python pipelines/reproduce.py digits --only-print      the table of existing cells
    python pipelines/reproduce.py mnist-z16 --record runs/checkpoints/RUN_ID   of an existing run

A cell is one (task, row, seed), kept as ``results/TASK/ROW-sSEED.json``; it is computed where there
is none with the same settings. IVE-GAN's runs lie in runs/reproduce and are resumed; baselines take
minutes and begin anew.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from ivegan import checkpoint, storage
from ivegan.config import PRESETS, flatten, from_dict
from ivegan.errors import UserError
from pipelines import options as cli
from pipelines.cluster.session import Terminated, stopped
from pipelines.paths import runs_dir
from pipelines.reproduction import cells as store
from pipelines.reproduction import tasks as plan
from pipelines.reproduction.table import render
from pipelines.reproduction.tasks import Cell, Table
from pipelines.training.plan import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reproduce(cli.Options):
    """Compute missing cells of the paper's tables, and print the tables."""

    tasks: Positional[tuple[str, ...]] = ()
    """Which tables: ring, grid, ablations-ring, digits, ablations-digits, mnist-z16, mnist-z3,
    ablations-mnist, celeba; all, or with --quick ring and digits, by default."""
    quick: bool = False
    """Reduced tables of one seed."""
    seeds: tuple[int, ...] = ()
    """Instead of the task's own."""
    rows: tuple[str, ...] = ()
    """Rows to compute; all by default."""
    only_print: bool = False
    """Compute nothing."""
    record: str | None = None
    """A run's folder or checkpoint of IVE-GAN, to be measured as the cell that it belongs to."""
    data: str | None = None
    """Folder or s3:// URI that holds the data sets as digits/, mnist/, celeba/; runs/data by
    default."""
    storage: str | None = None
    """Where run folders go; runs/reproduce by default."""
    results: str = "results"
    """Folder of the cells."""
    threads: int = 1
    """CPU threads."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What IVE-GAN's networks compute in; baselines compute in float32."""


def main(options: Reproduce) -> dict[str, Any]:
    """Compute and print, or print the plan; return what ``--json`` prints."""
    options.at_least(threads=1)
    names = options.tasks or (plan.QUICK if options.quick else tuple(plan.TASKS))
    tasks = [plan.task_of(name, options.quick) for name in names]
    if not storage.is_local(options.results):
        raise UserError(f"--results is {options.results}, but must be a folder of this machine.")
    results = Path(options.results)
    wanted = {task.name: plan.cells(task, options.seeds, options.rows) for task in tasks}
    missing = [cell for own in wanted.values() for cell in own if store.read(results, cell) is None]
    summary = {"cells": sum(map(len, wanted.values())), "missing": [c.name for c in missing]}
    if options.dry_run:
        for cell in missing:
            print(f"{cell.name:32} {cell.config.total_images:>12,} images  {_settings(cell)}")
        print(f"{len(missing)} of {summary['cells']} cells are missing")
        return summary
    if options.record:
        _record(options, results, [cell for own in wanted.values() for cell in own])
    elif not options.only_print:
        for number, cell in enumerate(missing, 1):
            log.info("cell %d of %d: %s", number, len(missing), cell.name)
            try:
                store.write(results, cell, store.compute(cell, _run(options, cell)))
            except (KeyboardInterrupt, Terminated) as stop:
                stopped(stop, "the same command")
    return summary | {"tables": {task.name: _print(task, options.seeds, results) for task in tasks}}


def _run(options: Reproduce, cell: Cell) -> Run:
    """Return where and how fast a cell is computed: in this process."""
    dataset, data = cell.config.dataset, None
    if not cell.config.is_points and (options.data or dataset != "digits"):
        data = storage.join(options.data or str(runs_dir() / "data"), dataset)
    return Run(
        data=data,
        storage=options.storage or str(runs_dir() / "reproduce"),
        workers=0,
        threads=options.threads,
        precision=options.precision if cell.method == plan.IVE_GAN else "float32",
        resume=True,
    )


def _record(options: Reproduce, results: Path, candidates: list[Cell]) -> None:
    """Measure an existing run as the cell whose settings it has.

    Raises:
        UserError: it has those of none, or is not finished.
    """
    assert options.record is not None
    uri = checkpoint.find(storage.absolute(options.record))
    metadata = checkpoint.read_metadata(uri)
    config = from_dict(metadata["config"])
    for cell in candidates:
        if cell.method == plan.IVE_GAN and cell._replace(config=config).hash == cell.hash:
            if metadata["step"] < config.total_steps:
                raise UserError(f"{uri} is not finished: continue the run with --resume.")
            return store.write(results, cell, store.recorded(cell, uri, _run(options, cell)))
    raise UserError(
        f"{uri} has the settings of no cell of these tasks: compare with --dry-run, or train it "
        "with reproduce.py."
    )


def _settings(cell: Cell) -> str:
    """Return a cell's method, and its settings where they differ from the preset's."""
    own, theirs = flatten(cell.config), flatten(PRESETS[cell.preset])
    changed = [f"{k} {v}" for k, v in own.items() if theirs[k] != v and k != "total_images"]
    return f"{cell.method} with {cell.preset}: {', '.join(changed)}"


def _print(task: Table, seeds: tuple[int, ...], results: Path) -> str:
    """Print the table of a task's existing cells, of its own seeds and of these; return it."""
    found: dict[str, list[store.Result]] = {}
    for cell in plan.cells(task, tuple(sorted({*task.seeds, *seeds}))):
        if result := store.read(results, cell):
            found.setdefault(cell.row, []).append(result)
    text = render(task, found)
    print(f"\n## {task.name}: {task.title}\n\n{text}")
    return text


def command() -> None:
    """Run as a program."""
    cli.run(main, Reproduce)


if __name__ == "__main__":
    command()
