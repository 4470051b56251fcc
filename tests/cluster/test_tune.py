"""Sweeps: trials that MLflow shows under one parent, compared by quality."""

import dataclasses
import json
import re
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from ivegan.config import PRESETS, override, preset
from ivegan.errors import UserError
from ivegan.evaluation import points
from pipelines import options as cli
from pipelines import record, train, tune
from pipelines.sweeps import definition, driver, report, space, trial
from pipelines.sweeps.definition import Sweep
from pipelines.sweeps.driver import sweep
from pipelines.training.fit import new_record
from pipelines.training.plan import Plan, Run, beside


def small():
    return override(preset("ring"), {"batch_size": 64, "total_images": 64 * 40})


def test_sweep_leaves_one_parent_and_one_child_per_trial(
    home, store, ray_cluster, mlflow_runs, capsys
):
    result = tune.main("ring", small(), Sweep(samples=3, sweep_id="s"))
    assert len(result["trials"]) == 3
    scores = [one["valid/quality"] for one in result["trials"]]
    assert result["best_metric"] == max(scores)
    assert all(0 <= score <= 1 for score in scores)
    searched = {"optim.lr_g", "optim.lr_d", "model.z_dim", "model.noise_dim"}
    assert set(result["best_config"]) == searched
    assert "pipelines/train.py ring --batch_size 64 --optim.lr_g" in capsys.readouterr().out
    assert result["objective"] == {"metric": "valid/quality", "mode": "max"}
    runs = {run.info.run_id: run for run in mlflow_runs(store)}
    parent = runs.pop(result["parent_run_id"])
    assert parent.info.status == "FINISHED"
    assert float(parent.data.tags["best.valid/quality"]) == max(scores)
    assert parent.data.params["space.model.z_dim"] == "2,3,4"
    assert "model.z_dim" not in parent.data.params  # a searched setting has no single value
    assert len(runs) == 3
    for child in runs.values():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status in ("FINISHED", "KILLED")  # killed: stopped early by ASHA
        assert "valid/quality" in child.data.metrics
    rates = {child.data.params["optim.lr_g"] for child in runs.values()}
    assert rates == {str(one["config"]["optim.lr_g"]) for one in result["trials"]}
    with Image.open(result["figure"]) as picture:
        assert picture.width > 1000
    # A store's address may hold a password.
    kept = {p.name: p.read_bytes() for p in (home / "runs/checkpoints/s/tune").glob("*.*")}
    assert "tuner.pkl" in kept
    assert not [name for name, content in kept.items() if store.encode() in content]

    with pytest.raises(UserError, match=r"s-000 is a run of train.py"):
        tune.main("ring", small(), Sweep(samples=1, sweep_id="s-000"))
    with pytest.raises(UserError, match="--resume needs --sweep-id"):
        tune.main("ring", small(), Sweep(samples=1, resume=True))
    with pytest.raises(UserError, match=r"sweep s exists.*--restore s"):
        tune.main("ring", small(), Sweep(samples=1, sweep_id="s"))
    assert tune.main("grid", small(), Sweep(restore="s", samples=9)) == result
    again = Sweep(samples=3, sweep_id="s", resume=True)
    assert sweep("ring", small(), again) == result
    with pytest.raises(UserError, match="started with another trials"):
        sweep("ring", small(), dataclasses.replace(again, samples=4))


def test_dry_run_prints_each_trial_and_writes_nothing(home, store, capsys):
    options = Sweep(samples=2, search="grid", dry_run=True, space="model.noise_dim=")
    described = tune.main("ring", small(), options)
    assert [t["model.z_dim"] for t in described["trials"]] == [2, 3, 4, 2, 3, 4]
    assert json.loads(capsys.readouterr().out)["space"]["optim.lr_g"] == "0.0001..0.002"
    assert not (home / "runs" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"time_budget": -1.0}, r"--time-budget is -1\.0, but must be 0 or more"),
        ({"search": "grid", "space": "batch_size=64,65"}, "65 cannot be cut"),
        ({"search": "optuna"}, "pip install optuna"),
        ({"restore": "nowhere"}, "no sweep nowhere"),
    ],
)
def test_impossible_sweep_is_refused_before_anything_is_written(
    home, store, options, sentence, monkeypatch
):
    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    with pytest.raises(UserError, match=sentence):
        tune.main("ring", small(), Sweep(**options))
    assert not (home / "runs" / "checkpoints").exists()


OTHER = {"workers": 2, "threads": 3, "precision": "bfloat16", "stream": True, "loaders": 2}


@pytest.mark.parametrize("options", [{}, OTHER | {"storage": "a folder", "data": "its data"}])
def test_printed_command_trains_the_best_as_its_trial(home, options):
    config = override(preset("digits"), {"total_images": 640, "model.width": 0.5})
    best = {"optim.lr_g": 3e-4, "model.z_dim": 3, "transform.flip": True}
    plan = definition.plan_of("digits", config, Sweep(sweep_id="s", **options))
    words = shlex.split(report.command_of(plan, best))
    name, parsed, run = cli.parse_preset(words[2:], PRESETS, Run, default="ring")
    assert parsed == override(config, best | {"total_images": preset("digits").total_images})
    described = train.main(name, parsed, dataclasses.replace(run, dry_run=True))
    assert described["workers"] == options.get("workers", 1)
    assert described["data"] == str(home / options.get("data", "runs/data/digits"))
    assert described["run_uri"].startswith(str(home / options.get("storage", "runs/checkpoints")))
    for flag in ("threads", "precision", "stream", "loaders", "gpu"):
        assert getattr(run, flag) == getattr(plan.run, flag)


def interrupt(*_: Any) -> NoReturn:
    """Stand in for a search that Ctrl-C ends."""
    raise KeyboardInterrupt


def searched(plan: Plan, scores: dict[int, dict[str, float]], failed: int = -1) -> list[Any]:
    """Stand in for a search: write each trial's last scores and return Tune's results."""
    for index, own in scores.items():
        images = int(own.pop("images", plan.images))
        run_uri = beside(plan, plan.config, f"{plan.run_id}-{index:03d}").run_uri
        named = {f"valid/{name}": value for name, value in own.items()}
        record.write_points(run_uri, images, named, "score")
    errors = dict.fromkeys(scores) | ({failed: RuntimeError("no memory")} if failed >= 0 else {})
    return [
        SimpleNamespace(path=f"tune/{index:03d}", metrics={}, error=error, config=None)
        for index, error in errors.items()
    ]


def test_interrupted_sweep_names_its_restore_and_keeps_its_options(
    home, store, mlflow_runs, monkeypatch, capsys
):
    monkeypatch.setattr(driver, "_search", interrupt)
    options = Sweep(sweep_id="s", threads=2, retrain=True, retrain_images=640, samples=3)
    with pytest.raises(SystemExit) as end:
        tune.main("grid", override(preset("grid"), {"total_images": 64000}), options)
    assert end.value.code == 128 + signal.SIGINT
    flags = "--restore s --retrain --retrain-images 640"
    assert f"stopped; continue with {flags}" in capsys.readouterr().err
    assert [run.info.status for run in mlflow_runs(store)] == ["KILLED"]
    name, config, again = definition.restored(Sweep(restore="s", threads=1, samples=9))
    assert (name, config.total_images) == ("grid", 64000)
    assert (again.samples, again.threads, again.retrain_images) == (3, 2, 640)
    assert again.retrain
    now = definition.restored(Sweep(restore="s", retrain_images=1280))[2]
    assert now.retrain_images == 1280


def test_sweep_is_not_restored_on_other_data(home, store, monkeypatch):
    monkeypatch.setattr(driver, "_search", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep("ring", small(), Sweep(sweep_id="s", samples=1))
    monkeypatch.setattr(driver, "check_data", lambda plan: "another hash")
    with pytest.raises(UserError, match="The sweep s was started on different data"):
        tune.main("ring", small(), Sweep(restore="s"))


def test_trials_are_sorted_by_their_score_and_those_without_one_come_last(
    home, store, digits_dataset, mlflow_runs, monkeypatch, capsys
):
    """The distance decides, though quality would prefer another trial."""
    scores = {
        0: {"quality": 0.9, "frechet": 30.0},
        2: {"images": 640, "quality": 0.1, "frechet": 3.0},
    }
    monkeypatch.setattr(driver, "_search", lambda plan, *_: searched(plan, scores, failed=1))
    config = override(preset("digits"), {"total_images": 1280})
    options = Sweep(samples=4, sweep_id="s", data=digits_dataset, score="valid/frechet")
    result = tune.main("digits", config, options)
    states = {t["trial"]: t["state"] for t in result["trials"]}
    assert states == {"002": "stopped early", "000": "done", "001": "failed", "003": "not scored"}
    assert list(states)[:2] == ["002", "000"]
    assert result["objective"] == {"metric": "valid/frechet", "mode": "min"}
    assert result["best_metric"] == 3.0
    out = capsys.readouterr().out
    assert re.search(r"^trial +frechet +images ", out, re.MULTILINE)
    assert re.search(r"^003 +not scored +0 ", out, re.MULTILINE)
    assert [run.info.status for run in mlflow_runs(store)] == ["FINISHED"]
    with pytest.raises(UserError, match="started with another objective"):
        sweep("digits", config, dataclasses.replace(options, score="", resume=True))


def test_scores_and_evaluations_have_different_draws():
    config = preset("ring")
    chosen, final = (points.true_points(config.dataset, 50, seed) for seed in (trial.SEED, 0))
    assert not np.isin(chosen, final).any()


def test_restored_sweep_counts_trials_that_ended_before(capsys):
    """Tune reports no trial twice."""
    objective = space.objective_of(preset("ring"), "")

    def one(index: int, images: int, score: float, finished: bool) -> Any:
        last = {"images_seen": images, objective.metric: score}
        named = {"config": {"trial": index}, "trial_id": str(index)}
        return SimpleNamespace(**named, last_result=last, is_finished=lambda: finished)

    before, now, weak = one(0, 1000, 0.75, True), one(1, 1000, 0.5, False), one(2, 500, 0.4, False)
    stopped = []
    progress = report.ScorePrinter(3, 1000, objective, stopped.append)
    for current in (now, weak):
        progress.on_trial_result(0, [before, now, weak], current, current.last_result)
        progress.on_trial_complete(0, [before, now, weak], current)
        current.is_finished = lambda: True
    out = capsys.readouterr().out
    assert "0.500  (best 0.750, trial 000)" in out
    assert "trial 001 is done; 2 of 3 have ended" in out
    assert "trial 002 stops early; 3 of 3 have ended" in out
    assert stopped == ["002"]


def test_the_end_of_a_sweep_leaves_trials_of_another_running(home, store):
    """Optuna names its trials, so they are found by the name of their sweep: S-2 begins with S."""
    options = Sweep(sweep_id="s", search="optuna")
    plan = definition.plan_of("ring", small(), options)
    trials = [beside(plan, plan.config, f"{of}-a", of) for of in ("s", "s-2")]
    for one in trials:
        record.write_record(one.run_uri, new_record(one, "ring"))
    with driver._trials_ended(plan, definition.define("ring", small(), options)):
        pass
    statuses = [record.read_record(one.run_uri).status for one in trials]
    assert statuses == ["KILLED", "RUNNING"]


def test_autoscaled_cluster_decides_how_many_trials_run_at_once(home, ray_cluster, monkeypatch):
    assert driver._slots(Sweep()) == 2
    assert driver._slots(Sweep(wait_for_nodes=60)) == 2  # nothing here can add nodes
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert driver._slots(Sweep(wait_for_nodes=60)) is None
    assert driver._slots(Sweep(wait_for_nodes=60, workers=2)) == 1


@pytest.mark.slow
def test_sweep_killed_in_its_first_seconds_starts_again(
    home, store, ray_cluster, mlflow_runs, monkeypatch
):
    """Tune had written its settings, but no state of trials; the sweep is one of the grid."""
    config = override(preset("grid"), {"batch_size": 64, "total_images": 640})
    with monkeypatch.context() as cut:
        cut.setattr(driver, "_search", interrupt)
        with pytest.raises(KeyboardInterrupt):
            sweep("grid", config, Sweep(samples=1, sweep_id="s"))
    left = home / "runs" / "checkpoints" / "s" / "tune"
    left.mkdir()
    (left / "tuner.pkl").write_bytes(b"unfinished")
    result = tune.main("ring", small(), Sweep(restore="s"))
    assert [t["state"] for t in result["trials"]] == ["done"]
    assert result["preset"] == "grid"
    assert {run.info.status for run in mlflow_runs(store)} == {"FINISHED"}


def test_sweep_without_a_score_raises_a_sentence(home, store, mlflow_runs, monkeypatch):
    monkeypatch.setattr(driver, "_search", lambda *_: [])  # the time budget left all trials out
    with pytest.raises(UserError, match="No trial of s came as far as a score"):
        sweep("ring", small(), Sweep(samples=1, sweep_id="s"))
    assert [run.info.status for run in mlflow_runs(store)] == ["FAILED"]


def test_best_trials_are_confirmed_on_fresh_seeds(home, store, monkeypatch, capsys):
    """The best of the search diverges on one of two fresh seeds; the second is stable."""
    searches = iter([{0: 0.9, 1: 0.8, 2: 0.1}, {0: 0.9, 2: 0.6, 3: 0.7}])
    definitions = []

    def ends(plan, definition, options):
        definitions.append(definition)
        return searched(plan, {i: {"quality": q} for i, q in next(searches).items()})

    monkeypatch.setattr(driver, "_search", ends)
    result = tune.main("ring", small(), Sweep(samples=3, sweep_id="s", confirm=2))
    assert [t["trial"] for t in result["trials"]] == ["001", "000", "002"]
    assert result["best_metric"] == pytest.approx(0.65)
    assert result["best_config"] == result["trials"][0]["config"]
    assert result["trials"][1]["confirmed_scores"] == [0.9, None]
    assert result["trials"][1]["confirmed"] is None
    assert "confirmed" in capsys.readouterr().out
    first, second = definitions[1].trials[:2]
    assert first["seed"] != second["seed"]
    assert first | {"seed": 0} == second | {"seed": 0} == definitions[0].trials[0] | {"seed": 0}
    searches = iter([{0: 0.9}, {0: 0.9}])
    with pytest.raises(UserError, match="Each of the best 1 trials of t diverged on a fresh seed"):
        tune.main("ring", small(), Sweep(samples=1, sweep_id="t", confirm=1))


@pytest.mark.slow
def test_diverged_trial_does_not_count_and_the_best_is_registered(
    home, store, ray_cluster, mlflow_runs, capsys
):
    """One of two trials has a learning rate that diverges."""
    options = Sweep(
        search="grid",
        samples=1,
        sweep_id="s",
        space="optim.lr_d=1e38,2e-4 optim.lr_g= model.z_dim= model.noise_dim=",
        retrain=True,
        retrain_images=640,
    )
    result = tune.main("ring", small(), options)
    assert [t["state"] for t in result["trials"]] == ["done", "diverged"]
    assert result["best_config"] == {"optim.lr_d": 2e-4}
    assert result["trials"][1]["valid/quality"] is None
    runs = {run.info.run_name: run for run in mlflow_runs(store)}
    assert {name: run.info.status for name, run in runs.items()} == {
        "s": "FINISHED",
        "s-000": "FAILED",
        "s-001": "FINISHED",
        "s-best": "FINISHED",
    }
    assert runs["s-best"].data.tags["sweep"] == "s"
    assert result["retrained"]["images_seen"] == 640
    assert Path(result["retrained"]["report"], "report.html").exists()
    version = MlflowClient(store).get_model_version_by_alias("ivegan-ring-encoder", "staging")
    assert version.tags["run_id"] == "s-best"
    assert "models:/ivegan-ring-encoder@staging" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"workers": 2, "max_concurrent": 1}, {"search": "optuna"}], ids=["ddp", "optuna"]
)
def test_trials_of_two_workers_and_trials_of_optuna(home, store, ray_cluster, mlflow_runs, options):
    result = sweep("ring", small(), Sweep(samples=3, sweep_id="s", **options))
    assert {"done"} <= {t["state"] for t in result["trials"]} <= {"done", "stopped early"}
    assert len({str(t["config"]) for t in result["trials"]}) == 3
    children = [r for r in mlflow_runs(store) if "mlflow.parentRunId" in r.data.tags]
    assert {c.info.run_name for c in children} == {t["run_id"] for t in result["trials"]}
    assert {c.data.params["workers"] for c in children} == {str(options.get("workers", 0))}
    assert "RUNNING" not in {c.info.status for c in children}
