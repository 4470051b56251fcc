"""The tables of reproduce.py: which cells are computed, what they hold, how they are printed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ivegan.config import override
from ivegan.errors import UserError
from ivegan.evaluation.report import MEANINGS
from pipelines.reproduce import Reproduce, main
from pipelines.reproduction import cells as store
from pipelines.reproduction import tasks as plan
from pipelines.reproduction.table import PUBLISHED, render
from pipelines.reproduction.tasks import TASKS, Cell, Table, Variant
from pipelines.training.plan import Run

TINY = Table(
    name="tiny",
    title="Eight Gaussians, hardly looked at",
    rows={
        "paper": Variant("IVE-GAN", "ring"),
        "gan": Variant("GAN", "ring", {}, "gan"),
        "bigan": Variant("BiGAN", "ring", {}, "bigan"),
    },
    metrics=("modes", "high_quality", "right_mode"),
    seeds=(0, 1),
    settings={"batch_size": 8, "total_images": 64, "model.width": 0.1},
    quick={"total_images": 16},
)


@pytest.fixture
def tiny(store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(TASKS, "tiny", TINY)
    return store


def run(*tasks: str, **options: Any) -> dict[str, Any]:
    return main(Reproduce(tasks=tasks or ("tiny",), **options))


def result_of(cell: Cell, **metrics: float) -> store.Result:
    return store._result(cell, Run(), 10.0, 64, metrics)


def test_only_missing_cells_are_computed(tiny: str, home: Path) -> None:
    first = run(seeds=(0,))
    assert first["missing"] == ["tiny-paper-s0", "tiny-gan-s0", "tiny-bigan-s0"]
    files = sorted((home / "results" / "tiny").iterdir())
    assert [f.name for f in files] == ["bigan-s0.json", "gan-s0.json", "paper-s0.json"]
    before = {f: f.stat().st_mtime_ns for f in files}
    again = run(seeds=(0,))
    assert again["missing"] == []
    assert {f: f.stat().st_mtime_ns for f in files} == before
    paper = json.loads(files[2].read_text())
    assert paper["images_seen"] == 64
    assert paper["config"]["total_images"] == 64
    assert {"modes", "high_quality_floor", "right_mode"} <= paper["metrics"].keys()
    assert "right_mode" not in json.loads(files[1].read_text())["metrics"]  # a GAN has no encoder
    assert "right_mode" in json.loads(files[0].read_text())["metrics"]


def test_a_finished_run_is_recorded_as_the_cell_whose_settings_it_has(
    tiny: str, home: Path
) -> None:
    run(seeds=(1,), rows=("paper",), results="elsewhere")
    trained = str(home / "runs" / "reproduce" / "tiny-paper-s1")
    run(record=trained)
    one, other = (home / where / "tiny" / "paper-s1.json" for where in ("results", "elsewhere"))
    assert json.loads(one.read_text()) == json.loads(other.read_text())
    assert run(dry_run=True)["missing"] == [
        *("tiny-paper-s0", "tiny-gan-s0", "tiny-gan-s1", "tiny-bigan-s0", "tiny-bigan-s1")
    ]
    with pytest.raises(UserError, match="has the settings of no cell"):
        run("ring", record=trained)


def test_a_dry_run_and_a_table_compute_nothing(
    tiny: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(run(dry_run=True)["missing"]) == 6
    assert "gan with ring: model.width 0.1, batch_size 8, seed 1" in capsys.readouterr().out
    run(only_print=True)
    assert not (home / "results").exists()
    run("ablations-digits", rows=("no-mismatched",), seeds=(0,), dry_run=True)
    assert "objective.mismatched 0.0" in capsys.readouterr().out  # the default of Config


def test_training_that_diverges_is_a_result(
    tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = {"optim.lr_g": 1e38, "optim.lr_d": 1e38}
    broken = dataclasses.replace(TINY, settings={**TINY.settings, **wild})
    monkeypatch.setitem(TASKS, "tiny", broken)
    tables = run(seeds=(0,), rows=("paper",))["tables"]
    assert tables["tiny"].count("1, 1 diverged") == 1
    stored = json.loads((home / "results" / "tiny" / "paper-s0.json").read_text())
    assert "lower the learning rates" in stored["failed"]
    assert stored["metrics"] == {}


def test_a_cell_of_other_settings_counts_as_missing(tmp_path: Path) -> None:
    cell, other = plan.cells(TINY, (0, 1), ("gan",))
    assert len({cell.hash, other.hash, cell._replace(method="bigan").hash}) == 3
    assert "optim.beta1" not in cell.settings  # the default of Config
    assert cell.settings["model.architecture"] == "points"
    store.write(tmp_path, cell, result_of(cell))
    assert store.read(tmp_path, cell) == result_of(cell)
    changed = cell._replace(config=override(cell.config, {"optim.lr_g": 1e-3}))
    assert store.read(tmp_path, changed) is None
    (tmp_path / cell.path).write_text('{"task": "tiny"}')
    with pytest.raises(UserError, match="delete it"):
        store.read(tmp_path, cell)


def test_a_table_has_floor_mean_spread_and_published_numbers() -> None:
    task = dataclasses.replace(TINY, name="ring")
    rows = {}
    for row, values in {"paper": (0.90, 0.94), "gan": (0.5,)}.items():
        own = plan.cells(task, tuple(range(len(values))), (row,))
        rows[row] = [
            result_of(cell, modes=8.0, high_quality=v, high_quality_floor=0.9889)
            for cell, v in zip(own, values, strict=True)
        ]
    lines = render(task, rows).splitlines()
    assert lines[2] == "| floor, real data |  |  | 98.9 % | 100.0 % |  |"
    assert lines[3] == "| IVE-GAN | 2 | 8.0 ± 0.0 | 92.0 ± 2.8 % |  | 10 |"
    assert lines[4] == "| GAN | 1 | 8.0 | 50.0 % |  | 10 |"
    assert (
        "| *published: GAN (PacGAN 2018, table 1)* |  | 6.3 ± 0.5 | 98.2 ± 0.2 % |  |  |" in lines
    )


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_a_table_of_valid_settings(name: str) -> None:
    task = plan.task_of(name)
    cells = plan.cells(task)
    assert len({cell.hash for cell in cells}) == len(cells) == len(task.rows) * len(task.seeds)
    assert set(task.metrics) <= MEANINGS.keys()
    assert len({(c.config.total_images) for c in cells if c.preset.endswith("plus")}) <= 1
    published = [row for row in PUBLISHED if name in row["tasks"]]
    assert all(row["metrics"].keys() <= set(task.metrics) for row in published)


def test_a_task_row_or_reduced_table_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="no task 'rings'"):
        run("rings")
    with pytest.raises(UserError, match="no row 'gans'; it has paper, plus, gan"):
        run("ring", rows=("gans",), dry_run=True)
    with pytest.raises(UserError, match="celeba has no --quick table"):
        run("celeba", quick=True, dry_run=True)
    summary = main(Reproduce(quick=True, dry_run=True))
    assert {name.partition("-quick-")[0] for name in summary["missing"]} == {"ring", "digits"}
    assert all(name.endswith("-s0") for name in summary["missing"])
