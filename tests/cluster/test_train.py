"""Training from the command to the checkpoint: in this process, on Ray, and as a Ray job."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from mlflow import MlflowClient
from processes import free_ports, interrupted, kill, wait_for
from safetensors.torch import load_file

from data_prep.building import build
from ivegan import checkpoint
from ivegan.config import override, preset
from ivegan.errors import UserError
from ivegan.step import NonFiniteLossError
from pipelines.record import read_metrics
from pipelines.training.fit import fit
from pipelines.training.plan import Run, resolve

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "pipelines" / "train.py")


@pytest.fixture
def ring(home, store):
    """Return a function that returns a function that trains a small ring and keeps its losses."""
    return functools.partial(_ring, home)


def losses_of(run_uri: str) -> list[dict[str, float]]:
    """Return the losses of a run's record, flush by flush."""
    return [
        {k: v for k, v in point.metrics.items() if k.startswith(("loss/", "logit/"))}
        for point in read_metrics(run_uri)
    ]


def _ring(home, workers=0, images=64 * 20, **changes):
    config = override(
        preset("ring"),
        {"batch_size": 64, "total_images": images}
        | {k.replace("__", "."): v for k, v in changes.items()},
    )
    options: dict[str, Any] = {"log_every": 64, "save_every": 64 * 10}

    def start(run_id="a", **more):
        run = Run(workers=workers, run_id=run_id, **(options | more))
        plan = resolve("ring", config, run)
        return fit(plan), losses_of(plan.run_uri)

    return start


def test_a_run_leaves_checkpoints_metrics_parameters_and_figures(home, ring):
    result, losses = ring()()
    assert result["images_seen"] == 1280
    assert result["world_size"] == 1
    assert result["images_per_second"] > 0
    assert len(losses) == 20
    config, _, _, metadata = checkpoint.load_networks(result["checkpoint"])
    assert config.dataset == "ring"
    assert metadata["run_id"] == result["run_id"]
    assert [Path(u).name for u in checkpoint.checkpoints(str(home / "runs/checkpoints/a"))] == [
        "checkpoint-0000000640",
        "checkpoint-0000001280",
    ]
    client = MlflowClient(f"sqlite:///{home}/runs/mlflow.db")
    run = client.get_run(result["mlflow_run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr_g"] == "0.0002"
    assert run.data.params["model.z_dim"] == "2"
    assert (run.data.params["stream"], run.data.params["precision"]) == ("False", "float32")
    assert run.data.tags["preset"] == "ring"
    assert len(run.data.tags["git_commit"]) >= 7
    history = client.get_metric_history(result["mlflow_run_id"], "loss/D")
    assert [p.step for p in history] == [64 * k for k in range(1, 21)]
    np.testing.assert_allclose([p.value for p in history], [m["loss/D"] for m in losses])
    kept = {f.path for f in client.list_artifacts(result["mlflow_run_id"])}
    assert {"config.json", "figures"} <= kept


def test_the_same_seed_gives_the_same_metrics_and_another_does_not(home, ring):
    _, one = ring()("one")
    _, two = ring()("two")
    _, other = ring(seed=1)("other")
    assert one == two
    assert one != other


def test_an_interrupted_run_goes_on_bit_for_bit(store, ring, mlflow_runs):
    whole, unbroken = ring()("whole")
    ring(images=64 * 10)("half")
    resumed, rest = ring()("half", resume=True)
    assert rest == unbroken
    a, b = (load_file(Path(r["checkpoint"]) / "weights.safetensors") for r in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert resumed["mlflow_run_id"] != whole["mlflow_run_id"]
    names = [run.info.run_name for run in mlflow_runs(store)]
    assert names.count("half") == 1  # one MLflow run, though started twice


def test_a_taken_run_id_is_refused_and_keeps_what_it_has(home, ring):
    ring()("taken")
    before = sorted(p for p in (home / "runs/checkpoints/taken").rglob("*"))
    with pytest.raises(UserError, match=r"taken exists.*--resume"):
        ring()("taken")
    assert sorted(p for p in (home / "runs/checkpoints/taken").rglob("*")) == before


def test_resuming_with_other_settings_names_them(home, ring):
    ring()("a")
    with pytest.raises(UserError, match=r"optim\.lr_g was 0\.0002 and is 0\.1"):
        ring(optim__lr_g=0.1)("a", resume=True)


def test_a_diverged_run_is_marked_failed(store, ring, mlflow_runs):
    with pytest.raises(NonFiniteLossError, match="in step"):
        ring(optim__lr_d=1e38, optim__lr_g=1e38)("wild")
    assert [run.info.status for run in mlflow_runs(store)] == ["FAILED"]


def test_a_terminal_that_is_gone_does_not_stop_training(store, ring, mlflow_runs, caplog):
    shown = []

    def show(event):
        shown.append(event)
        raise BrokenPipeError("the reader went away")

    config = override(preset("ring"), {"batch_size": 64, "total_images": 640})
    run = Run(workers=0, run_id="unwatched", log_every=64)
    result = fit(resolve("ring", config, run), show=show)
    assert result["images_seen"] == 640
    assert len(shown) == 1
    assert "the reader went away" in caplog.text
    (tracked,) = mlflow_runs(store)
    history = MlflowClient(store).get_metric_history(tracked.info.run_id, "loss/D")
    assert len(history) == 10


def test_what_the_listener_met_is_raised_when_the_workers_end(
    home, store, ray_cluster, mlflow_runs
):
    config = override(preset("ring"), {"batch_size": 64, "total_images": 640})

    def measure(at):
        raise RuntimeError(f"cannot score {at}")

    run = Run(workers=2, run_id="unscored")
    with pytest.raises(RuntimeError, match="cannot score"):
        fit(resolve("ring", config, run), measure=measure)
    assert [run.info.status for run in mlflow_runs(store)] == ["FAILED"]


def test_a_run_is_not_resumed_on_other_data(home, store, digits_dataset):
    data = home / "data"
    shutil.copytree(digits_dataset, data)
    config = override(preset("digits"), {"batch_size": 16, "total_images": 32})
    run = Run(workers=0, run_id="moved", data=str(data), resume=True)
    fit(resolve("digits", config, run))
    manifest = json.loads((data / "manifest.json").read_text())
    labels = manifest["label_names"]
    (data / "manifest.json").write_text(json.dumps({**manifest, "label_names": labels[::-1]}))
    with pytest.raises(UserError, match=r"run moved was begun on other data: .*hash"):
        fit(resolve("digits", override(config, {"total_images": 64}), run))


@pytest.mark.parametrize(
    ("preset_name", "changes", "options", "sentence"),
    [
        ("mnist", {}, {}, "needs --data"),
        ("ring", {"batch_size": 6}, {"workers": 2}, "batch_size 6"),
        ("ring", {}, {"run_id": "a/b"}, "run-id"),
        ("mnist", {}, {"data": "nowhere"}, "nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused(home, preset_name, changes, options, sentence):
    config = override(preset(preset_name), changes)
    with pytest.raises(UserError, match=sentence):
        fit(resolve(preset_name, config, Run(**options)))
    assert not (home / "runs" / "checkpoints").exists()


def test_data_of_another_shape_are_refused(home, digits_dataset):
    run = Run(data=str(digits_dataset), workers=0)
    with pytest.raises(UserError, match=r"\(1, 16, 16\).*\(1, 32, 32\)"):
        fit(resolve("mnist", preset("mnist"), run))


def test_an_uploaded_working_directory_holds_no_runs(home, monkeypatch):
    folder = home / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="--storage"):
        resolve("ring", preset("ring"), Run())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    plan = resolve("ring", preset("ring"), Run(storage=str(home)))
    assert not Path(plan.cache_dir).is_relative_to(folder)


def command(*words, cwd, status=0, **env):
    """Run the train command as a person would; return stdout and stderr."""
    done = subprocess.run(
        [sys.executable, TRAIN, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
        env={**os.environ, **env},
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rnig"], "There is no preset 'rnig'"),
        (["mnist", "--workers", "0"], "needs --data"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_status_2(home, words, sentence):
    out, err = command(*words, cwd=home, status=2)
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert out == ""
    assert not (home / "runs").exists()


def test_the_command_prints_json_on_its_last_line_and_a_dry_run_writes_nothing(home):
    words = ["ring", "--batch-size", "64", "--total-images", "640", "--workers", "0", "--json"]
    out, _ = command(*words, "--dry-run", cwd=home)
    assert json.loads(out.splitlines()[-1])["steps"] == 10
    assert not (home / "runs").exists()
    out, _ = command(*words, cwd=home)
    result = json.loads(out.splitlines()[-1])
    assert {"run_id", "mlflow_run_id", "checkpoint", "images_seen", "images_per_second"} <= set(
        result
    )
    assert result["world_size"] == 1
    assert "loss/D" in result["metrics"]
    assert "images 640 of 640" in out


@pytest.mark.parametrize(
    ("workers", "by"),
    [
        ("0", signal.SIGTERM),
        ("0", signal.SIGINT),
        ("2", signal.SIGTERM),
    ],
)
def test_a_stopped_run_is_killed_in_mlflow_and_can_go_on(home, store, mlflow_runs, workers, by):
    words = ["ring", "--batch-size", "64", "--run-id", "x"]
    endless = ["--total-images", "64000000", "--log-every", "64000", "--save-every", "64000"]
    endless = [sys.executable, TRAIN, *words, *endless, "--workers", workers]
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


def test_a_ray_of_its_own_leaves_no_process_behind(home):
    """Not even a worker that does not end when it should, as now and then one of Ray's."""
    script = """
        import atexit, os, threading
        from pipelines.cluster.session import ray_session

        class Stuck:
            def begin(self):
                atexit.register(threading.Event().wait)
                return os.getpid()

        with ray_session():
            import ray

            actor = ray.remote(Stuck).remote()
            worker = ray.get(actor.begin.remote())
            del actor
        print(worker)
    """
    words = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, check=True)
    with contextlib.suppress(psutil.NoSuchProcess):
        assert psutil.Process(int(done.stdout)).status() == psutil.STATUS_ZOMBIE


def test_two_ray_workers_follow_the_plain_loop(home, ray_cluster, ring):
    """Same data, same draws: over 100 steps only the order of additions differs."""
    images = 64 * 100
    _, plain = ring(images=images)("plain")
    result, two = ring(workers=2, images=images)("two")
    assert result["world_size"] == 2
    assert len(two) == len(plain) == 100
    for a, b in zip(plain, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
    again, repeated = ring(workers=2, images=images)("again")
    assert repeated == two  # bit for bit: same seed, world size and threads
    a, b = (load_file(Path(r["checkpoint"]) / "weights.safetensors") for r in (result, again))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_shards_and_checkpoints_live_in_a_bucket(s3, home, store, ray_cluster):
    """Built to S3, trained from there by two Ray workers, resumed and read back from there."""
    build("digits", source=None, out=f"{s3}/digits", workers=0)
    sizes: dict[str, Any] = {"batch_size": 16, "model.width": 0.25}
    places: dict[str, Any] = {"data": f"{s3}/digits", "storage": f"{s3}/runs", "run_id": "far"}
    for workers, images in ((2, 16 * 8), (0, 16 * 12)):
        config = override(preset("digits"), {**sizes, "total_images": images})
        run = Run(workers=workers, resume=True, save_every=16 * 4, **places)
        result = fit(resolve("digits", config, run))
        assert result["images_seen"] == images
    kept = [uri.rpartition("-")[2] for uri in checkpoint.checkpoints(f"{s3}/runs/far")]
    assert [int(seen) for seen in kept] == [64, 128, 192]
    assert result["checkpoint"] == checkpoint.find(f"{s3}/runs/far")
    _, encoder, _, metadata = checkpoint.load_networks(result["checkpoint"])
    assert metadata["data"] == f"{s3}/digits"
    assert encoder(torch.rand(2, 1, 16, 16)).isfinite().all()


@pytest.fixture
def digits(home, store, tmp_path):
    """Return a function that trains small digits from ten shards and keeps its losses."""
    uri = str(tmp_path / "ten-shards")
    build("digits", source=None, out=uri, workers=0, shard_size=135)

    def start(run_id, images=16 * 12, batch_size=16, norm="none", **options):
        sizes = {"batch_size": batch_size, "model.width": 0.25, "total_images": images}
        sizes["model.norm"] = norm
        run = Run(data=uri, run_id=run_id, log_every=16, save_every=16 * 6, **options)
        plan = resolve("digits", override(preset("digits"), sizes), run)
        return fit(plan), [one["loss/D"] for one in losses_of(plan.run_uri)]

    return start


def test_a_streamed_run_goes_on_bit_for_bit(digits):
    whole, unbroken = digits("whole", workers=0, stream=True, loaders=0)
    digits("half", workers=0, stream=True, loaders=0, images=16 * 6)
    resumed, rest = digits("half", workers=0, stream=True, loaders=1, resume=True)
    assert rest == unbroken
    a, b = (load_file(Path(r["checkpoint"]) / "weights.safetensors") for r in (whole, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_two_ray_workers_stream_what_one_process_streams(digits, ray_cluster):
    _, plain = digits("plain", workers=0, stream=True, loaders=0)
    result, two = digits("two", workers=2, stream=True, loaders=1)
    assert result["world_size"] == 2
    assert two == pytest.approx(plain, rel=1e-3, abs=1e-3)
    _, cached = digits("cached", workers=0)
    assert cached != pytest.approx(plain, rel=1e-3, abs=1e-3)  # another order of the samples


def test_streaming_is_not_switched_on_or_off_in_a_run(digits):
    digits("a", workers=0)
    with pytest.raises(UserError, match=r"other settings: stream was False and is True"):
        digits("a", workers=0, stream=True, resume=True)


def test_bfloat16_trains_and_is_not_switched_off_in_a_run(digits):
    _, whole = digits("whole", workers=0)
    _, half = digits("half", workers=0, precision="bfloat16")
    assert half != whole
    assert half == pytest.approx(whole, rel=0.1, abs=0.1)
    with pytest.raises(UserError, match="precision was bfloat16 and is float32"):
        digits("half", workers=0, resume=True)


def test_a_batch_may_be_computed_in_parts(digits):
    """Group norm looks at one sample at a time, so parts change nothing but roundings."""
    _, whole = digits("whole", workers=0, norm="group")
    _, parted = digits("parted", workers=0, accumulate=4, norm="group")
    assert parted == pytest.approx(whole, rel=1e-3, abs=1e-3)
    with pytest.raises(UserError, match=r"accumulate was 4 and is 1"):
        digits("parted", workers=0, resume=True, norm="group")
    with pytest.raises(UserError, match=r"cannot be cut into 3 equal, even parts"):
        digits("odd", workers=0, accumulate=3)


@pytest.mark.slow
def test_a_compiled_run_computes_the_same(home, store):
    """In processes of their own: torch.compile cannot look into what checks shapes in tests."""
    sizes = ["digits", "--batch_size", "16", "--model.width", "0.25", "--total-images", "192"]
    found = []
    for flags in ([], ["--compile"]):
        name = ["--run-id", f"run{len(flags)}", "--workers", "0", "--json"]
        out, _ = command(*sizes, *name, *flags, cwd=home)
        found.append(json.loads(out.splitlines()[-1])["metrics"])
        del found[-1]["rate/images_per_second"]
    whole, compiled = found
    assert compiled != whole  # fused operations round less often
    assert compiled == pytest.approx(whole, rel=1e-3, abs=1e-3)
    _, err = command(*sizes, "--run-id", "run1", "--workers", "0", "--resume", cwd=home, status=2)
    assert "compile was True and is False" in err


def test_more_workers_than_lanes_are_a_sentence_before_anything_starts(digits, home):
    with pytest.raises(UserError, match=r"has 10 shards of train.*streamed by 1 to 8 workers"):
        digits("many", workers=16, stream=True, batch_size=64)
    assert not (home / "runs" / "checkpoints").exists()


def test_bad_samples_are_left_out_of_training_if_asked(digits, tmp_path, caplog):
    (shard := tmp_path / "ten-shards" / "train" / "shard-00003.tar").write_bytes(
        shard.read_bytes()[:50_000]
    )
    with pytest.raises(UserError, match=r"train/shard-00003.tar is not the one of the manifest"):
        digits("stopped", workers=0)
    result, _ = digits("left-out", workers=0, on_bad_sample="skip")
    assert result["images_seen"] == 16 * 12
    assert "shard-00003.tar: " in caplog.text
    assert "of 135 samples left out" in caplog.text


def test_asking_for_more_than_the_cluster_has_is_a_sentence(home, ray_cluster, ring):
    with pytest.raises(UserError, match=r"64 workers of 1 CPU each.*room for 2"):
        ring(workers=64, batch_size=128)("big")


@pytest.mark.slow
def test_a_killed_ray_worker_costs_nothing_but_time(home, ray_cluster, ring):
    """One of two workers gets SIGKILL at the first checkpoint; the run ends as if it had not."""
    cadence: dict[str, Any] = {"log_every": 64 * 500, "save_every": 64 * 500}
    start = ring(workers=2, images=64 * 4000)
    unbroken, _ = start("unbroken", **cadence)
    killed: list[int] = []

    def kill_once(event):
        if event.get("checkpoint") and not killed:
            worker = next(
                p
                for p in psutil.process_iter(["name", "cmdline"])
                if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])
            )
            worker.kill()
            killed.append(event["images_seen"])

    config = override(preset("ring"), {"batch_size": 64, "total_images": 64 * 4000})
    run = Run(workers=2, run_id="killed", **cadence)
    result = fit(resolve("ring", config, run), show=kill_once)
    assert killed
    assert killed[0] < result["images_seen"] == 64 * 4000
    a, b = (load_file(Path(r["checkpoint"]) / "weights.safetensors") for r in (unbroken, result))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def head(tmp_path):
    """A Ray head of its own, as `ray start --head` makes it; yields the address for jobs."""
    port, dashboard, client, agent = free_ports(4)
    ray = str(Path(sys.executable).with_name("ray"))
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    folder = tempfile.mkdtemp(prefix="ray-")  # short: Ray puts sockets below it
    words = [
        *("--head", "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--temp-dir={folder}"),
        f"--dashboard-agent-listen-port={agent}",
        "--dashboard-host=127.0.0.1",
    ]
    log = tmp_path / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [ray, "start", *words], env=env, stdout=out, stderr=out, cwd=tmp_path
        )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        wait_for(lambda: takes_jobs(ray, address, env), process, log)
        yield address, env
    finally:
        kill(process)  # asked to end, it would wait half a minute for its own children
        shutil.rmtree(folder, ignore_errors=True)


def takes_jobs(ray: str, address: str, env: dict[str, str]) -> bool:
    """Return whether the head runs jobs; its dashboard answers long before its agent does."""
    words = [ray, "job", "submit", "--address", address, "--no-wait", "--", "true"]
    return subprocess.run(words, env=env, capture_output=True, check=False).returncode == 0


def test_a_submitted_job_leaves_its_checkpoint_and_its_run_outside_its_folder(head, tmp_path):
    address, env = head
    tracking_uri = f"sqlite:///{tmp_path}/mlflow.db"
    variables = {"MLFLOW_TRACKING_URI": tracking_uri, "IVEGAN_GIT_COMMIT": "abc1234"}
    runtime = {"env_vars": {**variables, "IVEGAN_CACHE": f"{tmp_path}/cache"}}
    ray = str(Path(sys.executable).with_name("ray"))
    submit = [ray, "job", "submit", "--address", address, "--working-dir", str(ROOT)]
    submit += ["--runtime-env-json", json.dumps(runtime), "--"]
    script = [sys.executable, "pipelines/train.py", "digits", "--total-images", "5000", "--json"]
    places = ["--storage", f"{tmp_path}/store", "--data", f"{tmp_path}/digits"]
    build("digits", source=None, out=f"{tmp_path}/digits", workers=0)
    done = subprocess.run(
        [*submit, *script, *places, "--run-id", "job"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    uri = checkpoint.find(f"{tmp_path}/store/job")
    config, encoder, _, metadata = checkpoint.load_networks(uri)
    assert config.total_images == 5000
    assert metadata["world_size"] == 2
    assert encoder(torch.rand(2, 1, 16, 16)).isfinite().all()
    mlflow = json.loads((tmp_path / "store/job/mlflow.json").read_text())
    run = MlflowClient(tracking_uri).get_run(mlflow["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["git_commit"] == "abc1234"
    assert run.data.metrics["loss/D"] > 0

    # Without places outside its folder the job says what to set, and fails.
    nowhere = subprocess.run(
        [*submit[:-3], "--", *script], capture_output=True, text=True, env=env, check=False
    )
    assert nowhere.returncode != 0
    assert "set --storage" in nowhere.stdout + nowhere.stderr

    # Nodes that nobody adds are waited for, and reported.
    many = ["ring", "--workers", "64", "--wait-for-nodes", "6", *places[:2], "--run-id", "many"]
    waits = subprocess.run(
        [*submit, *script[:2], *many], capture_output=True, text=True, env=env, check=False
    )
    assert waits.returncode != 0
    output = waits.stdout + waits.stderr
    assert "waiting for nodes: room for 2 of 64 workers of 1 CPU each" in output
    assert "room for 2 after waiting 6 s; lower --workers" in output
