"""Interrupted sweeps: Ctrl-C and SIGKILL of the driver, then --restore."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from processes import command, interrupted, program, wait_for

SWEEP = ["ring", "--samples", "6", "--batch_size", "64", "--total-images", "96000", "--json"]


def restored(home: Path) -> dict[str, Any]:
    """Return the result of the sweep that was cut."""
    done = command("tune.py", "--restore", "cut", "--json", cwd=home)
    return json.loads(done.stdout.splitlines()[-1])


def weights_of(home: Path, trial: str) -> dict[str, int]:
    """Return when each checkpoint of a trial was written, in nanoseconds."""
    found = (home / "runs" / "checkpoints" / f"cut-{trial}").rglob("weights.safetensors")
    return {str(path): path.stat().st_mtime_ns for path in found}


def test_interrupted_sweep_is_killed_in_mlflow_and_can_be_restored(home, store, mlflow_runs):
    # So long that no trial comes to its end while Ray ends.
    length = ["--samples", "3", "--total-images", "640000"]
    words = [*SWEEP[:-1], *length, "--max-concurrent", "2", "--sweep-id", "cut"]
    status, err = interrupted(program("tune.py", *words), home, "(best ", signal.SIGINT)
    assert status == 128 + signal.SIGINT, err[-3000:]
    assert "stopped; continue with --restore cut" in err
    assert "Traceback" not in err
    runs = mlflow_runs(store)
    assert {run.info.status for run in runs} == {"KILLED"}
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert 0 < len(children) < 3
    assert {child.data.tags["ended"] for child in children} == {"the sweep was stopped"}

    result = restored(home)
    assert sorted(t["trial"] for t in result["trials"]) == ["000", "001", "002"]
    assert {t["state"] for t in result["trials"]} <= {"done", "stopped early"}
    statuses = {run.info.run_name: run.info.status for run in mlflow_runs(store)}
    assert statuses.pop("cut") == "FINISHED"
    assert set(statuses.values()) <= {"FINISHED", "KILLED"}
    assert len(statuses) == 3


def test_killed_sweep_is_restored_without_repeating_finished_trials(home, store, mlflow_runs):
    words = program("tune.py", *SWEEP, "--sweep-id", "cut")
    process = subprocess.Popen(words, cwd=home, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen: list[str] = []
    for line in process.stdout:
        seen.append(line)
        if "2 of 6 have ended" in line:
            break
    # Tune records ended trials every 5 s; one that it has not recorded would continue.
    printed = time.time_ns()
    records = home / "runs" / "checkpoints" / "cut" / "tune"
    wait_for(
        lambda: any(f.stat().st_mtime_ns > printed for f in records.glob("experiment_state*.json")),
        process,
        home / "runs" / "checkpoints" / "cut" / "sweep.json",
    )
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    ended = {line.split()[1] for line in seen if "have ended" in line}
    assert len(ended) >= 2, "".join(seen)
    finished = {name: weights_of(home, name) for name in ended}
    result = restored(home)
    assert {t["trial"] for t in result["trials"]} == {f"{i:03d}" for i in range(6)}
    for trial in result["trials"]:  # scored ten times, also where the kill came between
        most = 10 if trial["state"] == "done" else 9
        assert 0 < len(trial["curve"]["images_seen"]) <= most
        assert trial["state"] != "done" or len(trial["curve"]["valid/quality"]) == most
    for name, before in finished.items():  # not trained again
        assert weights_of(home, name) == before
    runs = mlflow_runs(store)
    ends = {"done": "FINISHED", "stopped early": "KILLED"}
    wanted = {f"cut-{t['trial']}": ends[t["state"]] for t in result["trials"]}
    assert {run.info.run_name: run.info.status for run in runs} == wanted | {"cut": "FINISHED"}
    assert len(runs) == 7
    assert restored(home) == result  # nothing left to do
