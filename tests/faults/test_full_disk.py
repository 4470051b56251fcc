"""Disks that are full or read-only where a command writes, and trackers away at --resume.

A command ends with status 2 and one sentence, or training continues.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest

from pipelines import record as records
from pipelines.tracking import mirror

TRAIN = ("train.py", "ring", "--batch-size", "64", "--log-every", "64", "--workers", "0")
LAST = "checkpoint-0000001280/weights.safetensors"


class Disk:
    """A file system of its own, in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def change(self, options: str) -> None:
        """Mount it again with other options, ``size=1m`` or ``ro``."""
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True)

    def leave(self, free: int) -> None:
        """Make it so small that this many bytes are free."""
        self.change(f"size={shutil.disk_usage(self.folder).used + free}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]
    if subprocess.run(words, check=False).returncode:
        pytest.skip("only root mounts a small disk")
    yield Disk(folder)
    subprocess.run(["umount", folder], check=True)


@pytest.fixture
def command(home: Path) -> Callable[..., str]:
    """Return a function that runs a command of ours and returns its stderr."""

    def run(*words: str, **given: Any) -> str:
        done = processes.command(*words, cwd=home, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1", **given)
        assert "Traceback" not in done.stderr
        return done.stderr

    return run


def test_training_ends_on_a_full_disk_and_continues_where_there_is_room(command, disk, store, home):
    words = [*TRAIN, "--total-images", "1280", "--save-every", "64"]
    on_disk = ["--storage", str(disk.folder / "runs"), "--run-id", "a"]
    disk.leave(600_000)
    *_, sentence = command(*words, *on_disk, status=2).splitlines()  # MLflow may lack a part
    assert sentence.startswith(f"No space is left for {disk.folder}/runs/a/")
    assert not (disk.folder / "runs/a" / LAST).exists()
    disk.change("size=64m")
    command(*words, *on_disk, "--resume")
    command(*words, "--run-id", "unbroken")
    unbroken = home / "runs/checkpoints/unbroken"
    assert (disk.folder / "runs/a" / LAST).read_bytes() == (unbroken / LAST).read_bytes()
    disk.change("ro")
    more = [*TRAIN, "--total-images", "2560", *on_disk, "--resume"]
    assert "lies on a disk that is read-only: choose another" in command(*more, status=2)
    disk.change("rw")
    disk.leave(0)
    out = str(disk.folder / "report")
    assert "No space is left for" in command("evaluate.py", str(unbroken), "--out", out, status=2)


@pytest.mark.parametrize(
    ("options", "reason"), [("size=100k", "no room|free"), ("ro", "read-only")]
)
def test_a_cache_without_room_is_a_sentence(command, disk, store, options, reason):
    disk.change(options)
    words = ["train.py", "digits", "--total-images", "640", "--workers", "0"]
    err = command(*words, status=2, IVEGAN_CACHE=str(disk.folder))
    assert re.search(reason, err.splitlines()[-1]), err


def test_training_continues_without_room_for_the_database_of_mlflow(command, disk, store):
    path = disk.folder / "mlflow.db"
    shutil.copy(store.removeprefix("sqlite:///"), path)
    uri = {"MLFLOW_TRACKING_URI": f"sqlite:///{path}"}
    command(*TRAIN, "--total-images", "1280", "--run-id", "a", **uri)
    for number, images in enumerate((2560, 5120)):
        disk.leave(0) if not number else disk.change("ro,size=64m")
        words = [*TRAIN, "--total-images", str(images), "--run-id", "a", "--resume"]
        (line,) = command(*words, **uri).splitlines()[-1:]
        assert "MLflow lacks a part of" in line
        disk.change("rw,size=64m")
        assert command("registry.py", "sync", "--storage", "runs/checkpoints", **uri) == ""
    disk.leave(0)
    err = command(*TRAIN, "--total-images", "640", "--run-id", "b", status=2, **uri)
    assert err.splitlines()[-1].startswith(f"The MLflow store sqlite:///{path} cannot be used")


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "postgresql://u:sesame@127.0.0.1:9/x"])
def test_a_run_is_resumed_while_its_tracker_is_away(command, store, home, uri):
    command(*TRAIN, "--total-images", "640", "--run-id", "a")
    words = [*TRAIN, "--total-images", "1280", "--run-id", "a", "--resume"]
    err = command(*words, MLFLOW_TRACKING_URI=uri)
    assert "registry.py sync" in err
    assert "sesame" not in err
    run = str(home / "runs/checkpoints/a")
    assert records.read_record(run).status == "FINISHED"
    assert max(p.images_seen for p in records.read_metrics(run)) == 1280
    assert mirror.waiting(home / "runs/checkpoints")["a"] > 0
