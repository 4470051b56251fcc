"""Sweeps: trials that MLflow shows under one parent, chosen by quality."""

import dataclasses
import html
import json

import pytest
from mlflow import MlflowClient
from PIL import Image

from ivegan.config import override, preset
from ivegan.errors import UserError
from pipelines import tune


def small():
    return override(preset("ring"), {"batch_size": 64, "total_images": 64 * 40})


@pytest.mark.ray
def test_a_sweep_leaves_one_parent_and_one_child_per_trial(
    home, store, ray_cluster, mlflow_runs, capsys
):
    result = tune.main("ring", small(), tune.Sweep(samples=3, sweep_id="s"))
    assert len(result["trials"]) == 3
    scores = [trial[tune.SCORE] for trial in result["trials"]]
    assert result["best_metric"] == max(scores)
    assert all(0 <= score <= 1 for score in scores)
    assert {"optim.lr_g", "optim.lr_d", "model.z_dim", "model.noise_dim"} == set(
        result["best_config"]
    )
    out = capsys.readouterr().out
    assert "pipelines/train.py ring --batch_size 64 --optim.lr_g" in out
    runs = {run.info.run_id: run for run in mlflow_runs(store)}
    parent = runs.pop(result["parent_run_id"])
    assert parent.info.status == "FINISHED"
    assert float(parent.data.tags[f"best.{tune.SCORE}"]) == max(scores)
    assert len(runs) == 3
    for child in runs.values():
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.info.status in ("FINISHED", "KILLED")  # killed is what ASHA stopped
        assert tune.SCORE in child.data.metrics
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
        ({"space": "model.z=2"}, "There is no setting 'model.z'"),
        ({"search": "grid", "space": "batch_size=64,65"}, "65 cannot be cut"),
    ],
)
def test_a_sweep_that_cannot_be_ends_before_anything_is_written(home, store, options, sentence):
    with pytest.raises(UserError, match=sentence):
        tune.main("ring", small(), tune.Sweep(**options))
    assert not (home / "runs" / "checkpoints").exists()


@pytest.mark.ray
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
    assert result["trials"][1][tune.SCORE] == 0
    statuses = {run.info.run_name: run.info.status for run in mlflow_runs(store)}
    assert statuses == {
        "s": "FINISHED",
        "s-000": "FAILED",
        "s-001": "FINISHED",
        "s-best": "FINISHED",
    }
    retrained = result["retrained"]
    assert retrained["images_seen"] == 640
    assert (home / "runs" / "reports" / "s-best" / "report.html").exists()
    version = MlflowClient(store).get_model_version_by_alias("ivegan-ring-encoder", "staging")
    assert version.tags["run_id"] == "s-best"
    assert "models:/ivegan-ring-encoder@staging" in capsys.readouterr().out


@pytest.mark.ray
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
