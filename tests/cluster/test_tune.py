"""Sweeps: trials that MLflow shows under one parent, chosen by quality."""

import dataclasses
import html
import json
import re
import shlex
import shutil
import signal
import sys
import threading
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from ivegan.config import PRESETS, override, preset
from ivegan.errors import UserError
from ivegan.evaluation import evaluate
from pipelines import options as cli
from pipelines import train, tune
from pipelines.sweeps import report as sweep_report
from pipelines.sweeps import space
from pipelines.training.fit import fit
from pipelines.training.plan import Run, resolve


def small():
    return override(preset("ring"), {"batch_size": 64, "total_images": 64 * 40})


def test_a_sweep_leaves_one_parent_and_one_child_per_trial(
    home, store, ray_cluster, mlflow_runs, capsys
):
    result = tune.main("ring", small(), tune.Sweep(samples=3, sweep_id="s"))
    assert len(result["trials"]) == 3
    scores = [trial["valid/quality"] for trial in result["trials"]]
    assert result["best_metric"] == max(scores)
    assert all(0 <= score <= 1 for score in scores)
    assert {"optim.lr_g", "optim.lr_d", "model.z_dim", "model.noise_dim"} == set(
        result["best_config"]
    )
    out = capsys.readouterr().out
    assert "pipelines/train.py ring --batch_size 64 --optim.lr_g" in out
    assert result["objective"] == {"metric": "valid/quality", "mode": "max"}
    runs = {run.info.run_id: run for run in mlflow_runs(store)}
    parent = runs.pop(result["parent_run_id"])
    assert parent.info.status == "FINISHED"
    assert float(parent.data.tags["best.valid/quality"]) == max(scores)
    assert len(runs) == 3
    for child in runs.values():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status in ("FINISHED", "KILLED")  # killed is what ASHA stopped
        assert "valid/quality" in child.data.metrics
    tried = {child.data.params["optim.lr_g"] for child in runs.values()}
    assert tried == {str(trial["config"]["optim.lr_g"]) for trial in result["trials"]}

    places = home / "runs" / "checkpoints" / "s"
    page = (places / "sweep.html").read_text()
    assert "<td>002</td>" in page
    assert result["command"] in html.unescape(page)
    with Image.open(places / "sweep.png") as picture:
        assert picture.width > 1000
    under = {f.path for f in MlflowClient(store).list_artifacts(parent.info.run_id, "evaluation")}
    assert under == {"evaluation/sweep.html", "evaluation/sweep.png"}
    assert parent.data.params["space.model.z_dim"] == "2,3,4"
    assert "model.z_dim" not in parent.data.params  # what is searched has no one value

    with pytest.raises(UserError, match=r"sweep s exists.*--restore s"):
        tune.main("ring", small(), tune.Sweep(samples=1, sweep_id="s"))
    assert tune.sweep("ring", small(), tune.Sweep(restore="s")) == result
    assert tune.sweep("grid", small(), tune.Sweep(restore="s", samples=9)) == result
    again = tune.Sweep(samples=3, sweep_id="s", resume=True)
    assert tune.sweep("ring", small(), again) == result
    with pytest.raises(UserError, match="begun with another trials"):
        tune.sweep("ring", small(), dataclasses.replace(again, samples=4))


def test_a_sweep_that_never_was_cannot_be_restored(home, store):
    with pytest.raises(UserError, match="no sweep nowhere"):
        tune.main("ring", small(), tune.Sweep(restore="nowhere"))


def test_a_dry_run_tells_every_trial_and_writes_nothing(home, store, capsys):
    options = tune.Sweep(samples=2, search="grid", dry_run=True, space="model.noise_dim=")
    told = tune.main("ring", small(), options)
    assert [t["model.z_dim"] for t in told["trials"]] == [2, 3, 4, 2, 3, 4]
    assert json.loads(capsys.readouterr().out)["space"]["optim.lr_g"] == "0.0001..0.002"
    assert not (home / "runs" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"samples": 0}, "--samples is 0, but must be 1 or more"),
        ({"max_concurrent": -1}, "--max-concurrent is -1, but must be 0 or more"),
        ({"time_budget": -1.0}, r"--time-budget is -1\.0, but must be 0 or more"),
        ({"retrain_images": -5}, "--retrain-images is -5, but must be 0 or more"),
        ({"score": "valid/loss"}, r"--score valid/loss is not known for ring; .*valid/coverage"),
        ({"space": "model.z=2"}, "There is no setting 'model.z'"),
        ({"search": "grid", "space": "batch_size=64,65"}, "65 cannot be cut"),
    ],
)
def test_a_sweep_that_cannot_be_ends_before_anything_is_written(home, store, options, sentence):
    with pytest.raises(UserError, match=sentence):
        tune.main("ring", small(), tune.Sweep(**options))
    assert not (home / "runs" / "checkpoints").exists()


def test_optuna_is_missed_before_anything_is_written(home, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="pip install optuna"):
        tune.main("ring", small(), tune.Sweep(search="optuna"))
    assert not (home / "runs" / "checkpoints").exists()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"workers": 2, "threads": 3, "storage": "a folder"},
        {"precision": "bfloat16", "stream": True, "loaders": 2, "data": "its data"},
    ],
)
def test_the_command_of_the_best_trains_just_that(home, digits_dataset, options, capsys):
    if "data" in options:
        shutil.copytree(digits_dataset, home / options["data"])
    config = override(preset("digits"), {"total_images": 640, "model.width": 0.5})
    best = {"optim.lr_g": 3e-4, "model.z_dim": 3, "transform.flip": True}
    plan = tune._resolved("digits", config, tune.Sweep(sweep_id="s", **options))
    words = shlex.split(tune._command(plan, best))
    assert words[:2] == ["python", "pipelines/train.py"]
    name, found, run = cli.parse_preset(words[2:], PRESETS, Run, default="ring")
    assert name == "digits"
    changes = {**best, "total_images": preset("digits").total_images}
    assert found == override(config, changes)
    told = train.main(name, found, dataclasses.replace(run, dry_run=True))
    assert told["workers"] == options.get("workers", 1)
    assert told["data"] == str(home / options.get("data", "runs/data/digits"))
    assert told["run_uri"].startswith(str(home / options.get("storage", "runs/checkpoints")))
    for flag in ("threads", "precision", "stream", "loaders", "gpu"):
        assert getattr(run, flag) == getattr(plan.run, flag)


def stopped(*_: Any) -> NoReturn:
    """In the place of a search: Ctrl-C."""
    raise KeyboardInterrupt


def end_of(place: int, images: int = 0, error: Exception | None = None, **scores: float) -> Any:
    """Return what Tune tells of a trial; without images, of one that never reported."""
    metrics = {f"valid/{k}": v for k, v in scores.items()} | {"images_seen": images}
    told = metrics if images else {}
    return SimpleNamespace(path=f"tune/{place:03d}", metrics=told, error=error, config=None)


def test_a_stopped_sweep_says_how_to_go_on_and_keeps_how_it_was_begun(
    home, store, mlflow_runs, monkeypatch, capsys
):
    monkeypatch.setattr(tune, "_search", stopped)
    options = tune.Sweep(sweep_id="s", threads=2, retrain=True, retrain_images=640, samples=3)
    with pytest.raises(SystemExit) as end:
        tune.main("grid", override(preset("grid"), {"total_images": 64000}), options)
    assert end.value.code == 128 + signal.SIGINT
    assert "stopped; continue with --restore s" in capsys.readouterr().err
    assert [run.info.status for run in mlflow_runs(store)] == ["KILLED"]
    name, config, again = tune.restored(tune.Sweep(restore="s", threads=1, samples=9))
    assert (name, config.total_images) == ("grid", 64000)
    assert (again.samples, again.threads, again.retrain_images) == (3, 2, 640)
    assert again.retrain
    asked = tune.restored(tune.Sweep(restore="s", retrain_images=1280))[2]
    assert asked.retrain_images == 1280


def test_a_sweep_is_not_restored_on_other_data(home, store, digits_dataset, monkeypatch):
    monkeypatch.setattr(tune, "_search", stopped)
    shutil.copytree(digits_dataset, home / "data")
    config = override(preset("digits"), {"total_images": 1280})
    options = tune.Sweep(sweep_id="s", data="data", samples=1)
    with pytest.raises(KeyboardInterrupt):
        tune.sweep("digits", config, options)
    manifest = json.loads((home / "data" / "manifest.json").read_text())
    changed = {**manifest, "label_names": manifest["label_names"][::-1]}
    (home / "data" / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="The sweep s was begun on other data"):
        tune.sweep("ring", small(), tune.Sweep(restore="s"))


def test_trials_without_a_score_are_listed_and_a_page_that_failed_is_made_again(
    home, store, mlflow_runs, monkeypatch, capsys
):
    length = 64 * 40
    ends = [
        end_of(0, length, quality=0.25, coverage=0.5),
        end_of(1, error=RuntimeError("no memory")),
        end_of(2, length // 2, quality=0.5, coverage=0.25),
    ]
    monkeypatch.setattr(tune, "_search", lambda *_: ends)

    def full(*_: Any) -> NoReturn:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(sweep_report, "render", full)
        with pytest.raises(OSError, match="no space"):
            tune.main("ring", small(), tune.Sweep(samples=4, sweep_id="s"))
    assert [run.info.status for run in mlflow_runs(store)] == ["FAILED"]
    monkeypatch.setattr(tune, "_search", stopped)
    result = tune.main("ring", small(), tune.Sweep(restore="s"))
    states = {t["trial"]: t["state"] for t in result["trials"]}
    assert states == {"002": "stopped early", "000": "done", "001": "failed", "003": "not scored"}
    assert list(states)[:2] == ["002", "000"]
    assert result["best_metric"] == 0.5
    out = capsys.readouterr().out
    assert re.search(r"^003 +0 +not scored", out, re.MULTILINE)
    page = (home / "runs" / "checkpoints" / "s" / "sweep.html").read_text()
    assert "1 failed" in page
    assert "1 not scored" in page
    assert [run.info.status for run in mlflow_runs(store)] == ["FINISHED"]


def test_a_score_that_is_better_the_smaller_it_is(home, store, digits_dataset, monkeypatch):
    """The distance decides, though quality would have it the other way round."""
    ends = [end_of(0, 1280, quality=0.9, frechet=30.0), end_of(1, 1280, quality=0.1, frechet=3.0)]
    monkeypatch.setattr(tune, "_search", lambda *_: ends)
    config = override(preset("digits"), {"total_images": 1280})
    options = tune.Sweep(samples=2, sweep_id="s", data=digits_dataset, score="valid/frechet")
    result = tune.sweep("digits", config, options)
    assert result["objective"] == {"metric": "valid/frechet", "mode": "min"}
    assert result["best_metric"] == 3.0
    assert [t["trial"] for t in result["trials"]] == ["001", "000"]
    assert sweep_report.table(result)[0].split()[:3] == ["trial", "frechet", "images"]
    assert "chosen by frechet" in (home / "runs/checkpoints/s/sweep.html").read_text()
    with pytest.raises(UserError, match="begun with another objective"):
        tune.sweep("digits", config, dataclasses.replace(options, score="", resume=True))


def test_trials_are_chosen_on_other_draws_than_they_are_judged_by():
    config = preset("ring")
    chosen, judged = (evaluate._mixture(config.dataset, 50, seed) for seed in (tune._SEED, 0))
    assert not np.isin(chosen, judged).any()


def test_the_end_of_a_trial_is_told_in_a_thread_that_may_fail(capsys, caplog):
    free, told = threading.Event(), []

    def tell(name: str) -> None:
        free.wait(60)
        told.append((name, threading.current_thread() is threading.main_thread()))
        if name == "000":
            raise OSError("MLflow is away")

    objective = space.objective_of(preset("digits"), "frechet")
    shown = sweep_report.Progress(3, 1000, objective, tune.trial_name, tell)
    trials = [
        SimpleNamespace(
            config={"trial": i},
            trial_id=str(i),
            last_result={"images_seen": seen},
            is_finished=lambda: False,
        )
        for i, seen in enumerate((500, 1000, 600))
    ]
    for trial, score in zip(trials, (5.0, 3.0, 4.0), strict=True):
        shown.on_trial_result(0, trials, trial, {**trial.last_result, "valid/frechet": score})
        shown.on_trial_complete(0, trials, trial)
    assert not told  # and yet nobody waited
    out = capsys.readouterr().out
    assert "frechet 4.000  (best 3.000, trial 001)" in out
    assert "trial 002 stops early; 3 of 3 have ended" in out
    free.set()
    assert shown._thread is not None
    shown._thread.shutdown()
    assert told == [("000", False), ("002", False)]
    assert "Trial 000 is still shown as running (MLflow is away)" in caplog.text
    assert shown.__getstate__()["_thread"] is None


def test_a_restored_sweep_counts_what_ended_before(capsys):
    """Tune tells of no trial twice, and what is shown begins anew in every process."""
    objective = space.objective_of(preset("ring"), "")
    before = SimpleNamespace(
        config={"trial": 0},
        trial_id="a",
        last_result={"images_seen": 1000, objective.metric: 0.75},
        is_finished=lambda: True,
    )
    now = SimpleNamespace(
        config={"trial": 1}, trial_id="b", last_result={}, is_finished=lambda: False
    )
    shown = sweep_report.Progress(2, 1000, objective, tune.trial_name, lambda name: None)
    now.last_result = {"images_seen": 1000, objective.metric: 0.5}
    shown.on_trial_result(0, [before, now], now, now.last_result)
    shown.on_trial_complete(0, [before, now], now)
    out = capsys.readouterr().out
    assert "0.500  (best 0.750, trial 000)" in out
    assert "trial 001 is done; 2 of 2 have ended" in out


def test_a_stopped_trial_is_killed_in_mlflow_and_a_finished_one_is_left(home, store, mlflow_runs):
    for name in ("s-000", "s-001"):
        plan = resolve("ring", small(), Run(workers=0, run_id=name))
        fit(plan)
    client = MlflowClient(store)
    (running,) = [run for run in mlflow_runs(store) if run.info.run_name == "s-000"]
    client.update_run(running.info.run_id, status="RUNNING")  # as Tune leaves it
    for name in ("000", "001", "002"):  # the last of them never began
        tune._end_stopped(f"{home}/runs/checkpoints/s", name)
    found = {run.info.run_name: run for run in mlflow_runs(store)}
    assert {k: run.info.status for k, run in found.items()} == {
        "s-000": "KILLED",
        "s-001": "FINISHED",
    }
    assert found["s-000"].data.tags["ended"] == "stopped early by the sweep"


def test_an_autoscaled_cluster_decides_how_many_trials_run_at_once(home, ray_cluster, monkeypatch):
    assert tune._slots(tune.Sweep()) == 2
    assert tune._slots(tune.Sweep(wait_for_nodes=60)) == 2  # nothing here can add nodes
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert tune._slots(tune.Sweep(wait_for_nodes=60)) is None
    assert tune._slots(tune.Sweep(wait_for_nodes=60, workers=2)) == 1


def test_what_a_kill_left_of_the_first_seconds_is_begun_anew_and_the_best_trained(
    home, store, ray_cluster, mlflow_runs, monkeypatch
):
    """Tune had written down its settings, but no state of trials; the sweep is one of the grid."""
    config = override(preset("grid"), {"batch_size": 64, "total_images": 640})
    with monkeypatch.context() as cut:
        cut.setattr(tune, "_search", stopped)
        with pytest.raises(KeyboardInterrupt):
            tune.sweep("grid", config, tune.Sweep(samples=1, sweep_id="s"))
    left = home / "runs" / "checkpoints" / "s" / "tune"
    left.mkdir()
    (left / "tuner.pkl").write_bytes(b"unfinished")
    options = tune.Sweep(restore="s", retrain=True, retrain_images=1280)
    result = tune.main("ring", small(), options)
    assert [t["state"] for t in result["trials"]] == ["done"]
    assert result["preset"] == "grid"
    assert result["retrained"]["images_seen"] == 1280
    assert "ivegan-grid-encoder" in result["retrained"]["registered"]["names"]
    assert {run.info.status for run in mlflow_runs(store)} == {"FINISHED"}


def test_a_sweep_without_one_score_fails_in_a_sentence(home, store, ray_cluster, mlflow_runs):
    config = override(preset("ring"), {"batch_size": 64, "total_images": 64 * 10**6})
    with pytest.raises(UserError, match="No trial of s came as far as a score"):
        tune.sweep("ring", config, tune.Sweep(samples=1, sweep_id="s", time_budget=0.01))
    found = mlflow_runs(store)
    assert [r.info.status for r in found if "mlflow.parentRunId" not in r.data.tags] == ["FAILED"]
    assert "RUNNING" not in {run.info.status for run in found}


@pytest.mark.slow
# Tune leaves its own files of a trial open that time runs out for.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_time_budget_ends_what_runs_and_lists_what_never_ran(
    home, store, ray_cluster, mlflow_runs
):
    """Three that would take a day each, one after the other, and a first that is scored often."""
    config = override(preset("ring"), {"batch_size": 64, "total_images": 64 * 10**6})
    options = tune.Sweep(samples=3, scores=10_000, sweep_id="s", max_concurrent=1, time_budget=45)
    result = tune.sweep("ring", config, options)
    states = [t["state"] for t in result["trials"]]
    assert states == ["stopped early", "not scored", "not scored"]
    statuses = {run.info.run_name: run.info.status for run in mlflow_runs(store)}
    assert (statuses.pop("s"), statuses.pop("s-000")) == ("FINISHED", "KILLED")
    assert set(statuses.values()) <= {"KILLED"}


def test_a_trial_that_diverges_counts_for_nothing_and_the_best_goes_on_to_the_registry(
    home, store, ray_cluster, mlflow_runs, capsys
):
    """Of two trials one has a learning rate that nothing survives."""
    options = tune.Sweep(
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
    statuses = {run.info.run_name: run.info.status for run in mlflow_runs(store)}
    assert statuses == {
        "s": "FINISHED",
        "s-000": "FAILED",
        "s-001": "FINISHED",
        "s-best": "FINISHED",
    }
    (best,) = [run for run in mlflow_runs(store) if run.info.run_name == "s-best"]
    assert best.data.tags["sweep"] == "s"
    retrained = result["retrained"]
    assert retrained["images_seen"] == 640
    assert (home / "runs" / "reports" / "s-best" / "report.html").exists()
    version = MlflowClient(store).get_model_version_by_alias("ivegan-ring-encoder", "staging")
    assert version.tags["run_id"] == "s-best"
    assert "models:/ivegan-ring-encoder@staging" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"workers": 2, "max_concurrent": 1}, {"search": "optuna"}], ids=["ddp", "optuna"]
)
def test_trials_of_two_workers_and_trials_that_optuna_chooses(
    home, store, ray_cluster, mlflow_runs, options
):
    result = tune.sweep("ring", small(), tune.Sweep(samples=3, sweep_id="s", **options))
    assert len(result["trials"]) == 3
    assert {t["state"] for t in result["trials"]} <= {"done", "stopped early"}
    assert "done" in {t["state"] for t in result["trials"]}
    assert len({str(t["config"]) for t in result["trials"]}) == 3
    children = [r for r in mlflow_runs(store) if "mlflow.parentRunId" in r.data.tags]
    assert {c.info.run_name for c in children} == {t["run_id"] for t in result["trials"]}
    assert {c.data.params["workers"] for c in children} == {str(options.get("workers", 0))}
    assert "RUNNING" not in {c.info.status for c in children}
