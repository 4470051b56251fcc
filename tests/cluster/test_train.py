"""Training from the command to the checkpoint, in this process."""

import functools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from mlflow import MlflowClient
from processes import interrupted
from safetensors.torch import load_file

from ivegan import checkpoint
from ivegan.config import override, preset
from ivegan.errors import UserError
from ivegan.evaluation import images
from ivegan.step import NonFiniteLossError
from pipelines import train
from pipelines.background import repeated
from pipelines.training.fit import fit
from pipelines.training.plan import Run, resolve


def command(*words: str, cwd: Path, status: int = 0) -> tuple[str, str]:
    """Run the train command; return its stdout and stderr."""
    done = processes.command("train.py", *words, cwd=cwd, status=status)
    return done.stdout, done.stderr


def test_a_run_leaves_checkpoints_metrics_parameters_and_figures(home, store, ring):
    result, losses = ring()()
    assert result["images_seen"] == 1280
    assert result["world_size"] == 1
    assert result["images_per_second"] > 0
    assert len(losses) == 20
    config, _, _, metadata = checkpoint.load_networks(result["checkpoint"])
    assert (config.dataset, metadata["run_id"]) == ("ring", result["run_id"])
    assert [Path(u).name for u in checkpoint.checkpoints(str(home / "runs/checkpoints/a"))] == [
        "checkpoint-0000000640",
        "checkpoint-0000001280",
    ]
    client = MlflowClient(store)
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    expected = {"optim.lr_g": "0.0002", "model.z_dim": "2", "stream": "False"}
    assert run.data.params.items() >= expected.items()
    assert run.data.tags["preset"] == "ring"
    assert len(run.data.tags["git_commit"]) >= 7
    history = client.get_metric_history(result["mlflow_run_id"], "loss/D")
    assert [p.step for p in history] == [64 * k for k in range(1, 21)]
    assert [p.value for p in history] == [loss["loss/D"] for loss in losses]
    kept = {f.path for f in client.list_artifacts(result["mlflow_run_id"])}
    assert {"config.json", "figures"} <= kept


def test_an_interrupted_run_continues_bit_for_bit(store, ring, mlflow_runs):
    whole, unbroken = ring()("whole")
    ring(images=64 * 10)("half")
    resumed, rest = ring()("half", resume=True)
    assert rest == unbroken
    a, b = (load_file(Path(r["checkpoint"]) / "weights.safetensors") for r in (whole, resumed))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert resumed["mlflow_run_id"] != whole["mlflow_run_id"]
    names = [run.info.run_name for run in mlflow_runs(store)]
    assert names.count("half") == 1  # one MLflow run, though started twice
    _, other = ring(seed=1)("other")
    assert other != unbroken


def test_an_existing_run_is_resumed_only_with_its_own_settings(home, ring):
    ring()("a")
    before = {path: path.stat().st_mtime_ns for path in (home / "runs/checkpoints").rglob("*")}
    for settings, options, sentence in (
        ({}, {}, r"a exists.*--resume"),
        ({"optim__lr_g": 0.1}, {"resume": True}, r"optim\.lr_g was 0\.0002 and is 0\.1"),
        ({}, {"resume": True, "accumulate": 2}, "accumulate was 1 and is 2"),
    ):
        with pytest.raises(UserError, match=sentence):
            ring(**settings)("a", **options)
    after = {path: path.stat().st_mtime_ns for path in (home / "runs/checkpoints").rglob("*")}
    assert after == before


def test_a_diverged_run_is_marked_failed(store, ring, mlflow_runs):
    with pytest.raises(NonFiniteLossError, match="in step"):
        ring(optim__lr_d=1e38, optim__lr_g=1e38)("wild")
    assert [run.info.status for run in mlflow_runs(store)] == ["FAILED"]
    wild = {"batch_size": 64, "total_images": 640, "optim.lr_d": 1e38}
    with pytest.raises(UserError, match="in step"):
        train.main("ring", override(preset("ring"), wild), Run(workers=0))


def test_an_error_of_measuring_is_raised_when_the_workers_end():
    def look() -> None:
        raise RuntimeError("cannot score")

    with pytest.raises(RuntimeError, match="cannot score"), repeated(look, 60, "", last=True):
        pass


def test_a_run_is_not_resumed_on_other_data(home, store, digits_dataset):
    data = home / "data"
    shutil.copytree(digits_dataset, data)
    config = override(preset("digits"), {"batch_size": 16, "total_images": 32})
    run = Run(workers=0, run_id="moved", data=str(data), resume=True)
    fit(resolve("digits", config, run))
    manifest = json.loads((data / "manifest.json").read_text())
    labels = manifest["label_names"]
    (data / "manifest.json").write_text(json.dumps({**manifest, "label_names": labels[::-1]}))
    with pytest.raises(UserError, match=r"run moved was started on different data: .*hash"):
        fit(resolve("digits", override(config, {"total_images": 64}), run))


@pytest.mark.parametrize(
    ("preset_name", "changes", "options", "sentence"),
    [
        ("mnist", {}, {}, "needs --data"),
        ("ring", {"batch_size": 16}, {"accumulate": 3}, "cut into 6 equal, even parts"),
        ("ring", {}, {"run_id": "a/b"}, "run-id"),
        ("mnist", {}, {"data": "nowhere"}, "nowhere"),
        ("mnist", {}, {"data": "digits"}, r"\(1, 16, 16\).*\(1, 32, 32\)"),
        (
            "digits",
            {},
            {"data": "digits", "workers": 16, "stream": True},
            "has 2 shards .* 1 to 2 workers, .*not by 16: build it wi",
        ),
        ("ring-plus", {}, {"compile": True}, "--compile cannot compute the gradient penalties"),
    ],
)
def test_impossible_settings_are_refused(
    home, digits_dataset, preset_name, changes, options, sentence
):
    (home / "digits").symlink_to(digits_dataset)
    config = override(preset(preset_name), changes)
    with pytest.raises(UserError, match=sentence):
        fit(resolve(preset_name, config, Run(**options)))
    assert not (home / "runs").exists()


@pytest.mark.parametrize("pod", [False, True])
def test_a_job_whose_files_are_lost_holds_no_runs(home, monkeypatch, pod):
    """In the copy of a folder that Ray was given, and in a pod of Argo Workflows."""
    folder = home / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(home if pod else folder)
    if pod:
        monkeypatch.setenv("METAFLOW_KUBERNETES_WORKLOAD", "1")
    with pytest.raises(UserError, match="--storage"):
        resolve("ring", preset("ring"), Run())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    plan = resolve("ring", preset("ring"), Run(storage=str(home)))
    assert not Path(plan.cache_dir).is_relative_to(Path.cwd())


def test_the_command_prints_json_on_its_last_line_and_a_dry_run_writes_nothing(home, store, capsys):
    config = override(preset("ring"), {"batch_size": 64, "total_images": 640})
    assert train.main("ring", config, Run(workers=0, dry_run=True))["steps"] == 10
    with pytest.raises(UserError, match="--resume needs --run-id"):
        train.main("ring", config, Run(workers=0, resume=True))
    assert json.loads(capsys.readouterr().out)["config"]["total_images"] == 640
    assert not (home / "runs" / "checkpoints").exists()
    words = ["ring", "--batch-size", "64", "--total-images", "640", "--workers", "0", "--json"]
    out, _ = command(*words, cwd=home)
    result = json.loads(out.splitlines()[-1])
    names = {"run_id", "mlflow_run_id", "checkpoint", "images_seen", "images_per_second"}
    assert names | {"world_size", "metrics"} == set(result)
    assert result["world_size"] == 1
    assert "loss/D" in result["metrics"]
    assert "images 640 of 640" in out


def test_checkpoints_are_saved_as_often_as_requested(ring):
    result, _ = ring()("often", log_every=0, save_every=64)  # of 20 steps
    run_uri = result["checkpoint"].rpartition("/")[0]
    assert len(checkpoint.checkpoints(run_uri)) == 20


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "by"), [("0", signal.SIGINT), ("2", signal.SIGTERM)])
def test_a_stopped_run_is_killed_in_mlflow_and_can_be_resumed(
    home, store, mlflow_runs, workers, by
):
    words = ["ring", "--batch-size", "64", "--run-id", "x"]
    endless = ["--total-images", "64000000", "--log-every", "64000", "--save-every", "64000"]
    endless = processes.program("train.py", *words, *endless, "--workers", workers)
    status, err = interrupted(endless, home, "saved checkpoint-", by)
    assert status == 128 + by
    assert "--run-id x --resume" in err
    (run,) = mlflow_runs(store)
    assert run.info.status == "KILLED"
    newest = checkpoint.find(str(home / "runs/checkpoints/x"))
    seen = int(newest.rpartition("-")[2])
    more = [*words, "--total-images", str(seen + 640), "--workers", "0", "--resume", "--json"]
    out, _ = command(*more, cwd=home)
    assert json.loads(out.splitlines()[-1])["images_seen"] == seen + 640
    (run,) = mlflow_runs(store)
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_from_which_the_run_continues_bit_for_bit(home, store):
    words = ["ring", "--batch-size", "64", "--workers", "0", "--total-images", "64000"]
    words += ["--log-every", "640", "--save-every", "64000"]
    begin = processes.program("train.py", *words, "--run-id", "x")
    status, err = interrupted(begin, home, "images  ", signal.SIGTERM)
    assert status == 128 + signal.SIGTERM, err
    runs = home / "runs/checkpoints"
    (left,) = runs.glob("x/checkpoint-*")
    assert 0 < int(left.name.rpartition("-")[2]) < 64_000
    command(*words, "--run-id", "x", "--resume", cwd=home)
    command(*words, "--run-id", "unbroken", cwd=home)
    name = "checkpoint-0000064000/weights.safetensors"
    assert (runs / "x" / name).read_bytes() == (runs / "unbroken" / name).read_bytes()
    names = {p.name for p in (runs / "x").glob("metrics/*")}
    assert names == {p.name for p in (runs / "unbroken").glob("metrics/*")}


@pytest.mark.parametrize("units", [False, True])
def test_bfloat16_without_units_for_it_is_warned_of(units, small_digits, monkeypatch, caplog):
    found = {"architecture": "x86_64", "avx512_bf16": units, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    small_digits("run", images=16, workers=0, precision="bfloat16")
    assert ("no units for bfloat16" in caplog.text) != units


def test_a_streamed_run_continues_bit_for_bit(small_digits):
    whole, unbroken = small_digits("whole", workers=0, stream=True, loaders=0)
    small_digits("half", workers=0, stream=True, loaders=0, images=16 * 6)
    resumed, rest = small_digits("half", workers=0, stream=True, loaders=1, resume=True)
    assert rest == unbroken
    a, b = (load_file(Path(r["checkpoint"]) / "weights.safetensors") for r in (whole, resumed))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_precision_changes_roundings_only(small_digits):
    train = functools.partial(small_digits, workers=0, norm="group")
    _, whole = train("whole")
    _, half = train("half", precision="bfloat16")
    assert half != whole
    assert half == pytest.approx(whole, rel=0.1, abs=0.1)


@pytest.mark.slow
def test_a_compiled_run_computes_the_same(home, store):
    """In processes of their own: torch.compile cannot look into what checks shapes in tests."""
    sizes = ["digits", "--batch_size", "16", "--model.width", "0.25", "--total-images", "192"]
    metrics: list[dict[str, Any]] = []
    for flags in ([], ["--compile"]):
        out, _ = command(*sizes, "--workers", "0", "--json", *flags, cwd=home)
        metrics.append(json.loads(out.splitlines()[-1])["metrics"])
        del metrics[-1]["rate/images_per_second"]
    whole, compiled = metrics
    assert compiled != whole  # fused operations round less often
    assert compiled == pytest.approx(whole, rel=1e-3, abs=1e-3)


def test_bad_samples_are_left_out_of_training_on_request(small_digits, tmp_path, caplog):
    shard = tmp_path / "ten-shards" / "train" / "shard-00003.tar"
    shard.write_bytes(shard.read_bytes()[:50_000])
    with pytest.raises(UserError, match=r"train/shard-00003.tar is not the one of the manifest"):
        small_digits("stopped", workers=0)
    result, _ = small_digits("left-out", workers=0, on_bad_sample="skip")
    assert result["images_seen"] == 16 * 12
    metadata, uri = checkpoint.read_metadata(result["checkpoint"]), str(tmp_path / "ten-shards")
    measured = functools.partial(images.load, preset("digits"), uri, "valid", tmp_path / "c", None)
    assert len(measured(skip_bad=metadata["skip_bad"]).train) < 1350
    with pytest.raises(UserError, match="is not the one of the manifest"):
        measured()
    assert "shard-00003.tar: " in caplog.text
    assert "of 135 samples left out" in caplog.text
