"""Sweeps: trials that MLflow shows under one parent, chosen by quality."""

import pytest

from ivegan.config import override, preset
from ivegan.errors import UserError
from pipelines import tune

pytestmark = pytest.mark.ray


def small():
    return override(preset("ring"), {"batch_size": 64, "total_images": 64 * 40})


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

    with pytest.raises(UserError, match=r"sweep s exists.*--restore s"):
        tune.main("ring", small(), tune.Sweep(samples=1, sweep_id="s"))


def test_a_sweep_that_never_was_cannot_be_restored(home, store):
    with pytest.raises(UserError, match="no sweep nowhere"):
        tune.main("ring", small(), tune.Sweep(restore="nowhere"))
