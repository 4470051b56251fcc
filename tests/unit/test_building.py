"""Raw files become the same shards however many write them, or a sentence says why not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import files_of

from data_prep import building
from data_prep.build import command
from data_prep.building import build, make_plan, write_shard
from data_prep.verify import verify
from ivegan import storage
from ivegan.data.cache import load_split
from ivegan.data.manifest import read_manifest
from ivegan.data.tars import Sample, read_tar
from ivegan.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def samples_of(out: Path | str, split: str) -> list[Sample]:
    manifest = read_manifest(str(out))
    parts = [storage.read_bytes(storage.join(out, s.key)) for s in manifest.of_split(split)]
    return [sample for part in parts for sample in read_tar(part)]


def program(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data_prep" / "build.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Digits


def test_digits_keep_their_counts_and_every_class_its_share(digits_dataset, tmp_path):
    manifest = read_manifest(digits_dataset)
    assert manifest.splits == {"train": 1347, "valid": 150, "test": 300}
    assert manifest.image_shape == (1, 16, 16)
    seen = []
    whole = np.bincount(
        [s.meta["label"] for split in manifest.splits for s in samples_of(digits_dataset, split)]
    )
    for split, count in manifest.splits.items():
        samples = samples_of(digits_dataset, split)
        seen += [s.meta["source"] for s in samples]
        share = np.bincount([s.meta["label"] for s in samples], minlength=10)
        assert np.abs(share - whole * count / 1797).max() <= 1
    assert len(set(seen)) == 1797


def test_digits_use_the_whole_range_and_look_like_their_originals(digits_dataset):
    from sklearn.datasets import load_digits

    originals, labels = load_digits(return_X_y=True)
    for sample in samples_of(digits_dataset, "valid")[:20]:
        place = int(sample.meta["source"].partition("#")[2])
        assert sample.meta["label"] == labels[place]
        small = sample.image[0].reshape(8, 2, 8, 2).mean(axis=(1, 3)) / 255 * 16
        assert np.corrcoef(small.ravel(), originals[place])[0, 1] > 0.9
    images = np.stack([s.image for s in samples_of(digits_dataset, "valid")])
    assert images.min() == 0
    assert images.max() > 250


# The build itself


def test_a_second_run_does_nothing(digits_dataset, tmp_path):
    out = Path(shutil.copytree(digits_dataset, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = build("digits", None, str(out))
    assert (again["skipped"], again["shards"], again["samples"]) == (4, 4, 1797)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_settings_in_the_same_place_are_refused(idx_folder, tmp_path):
    out = tmp_path / "out"
    build("mnist", str(idx_folder), str(out))
    before = files_of(out)
    with pytest.raises(UserError, match="holds mnist built with other settings: choose another"):
        build("mnist", str(idx_folder), str(out), shard_size=7)
    with pytest.raises(UserError, match="holds mnist built from other files"):
        build("mnist", str(idx_folder), str(out), name="fashion")
    labels = idx_folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:8] + bytes(10))
    with pytest.raises(UserError, match="holds mnist built from other files"):
        build("mnist", str(idx_folder), str(out))
    assert files_of(out) == before


def test_a_killed_build_goes_on_and_ends_like_an_unbroken_one(idx_folder, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    build("mnist", str(idx_folder), str(unbroken), shard_size=4)
    plan = make_plan("mnist", str(idx_folder), str(killed), shard_size=4)
    building._claim(plan)
    for job in plan.jobs[:3]:
        write_shard(job)
    truncated = killed / plan.jobs[2].split / "shard-00002.tar"
    truncated.write_bytes(truncated.read_bytes()[:100])
    (killed / "train" / ".shard-00003.tar.abc").write_bytes(b"half")
    with pytest.raises(UserError, match="There is no data set"):
        read_manifest(str(killed))
    with pytest.raises(UserError, match="an unfinished build with other settings"):
        build("mnist", str(idx_folder), str(killed), shard_size=5)
    result = build("mnist", str(idx_folder), str(killed), shard_size=4)
    assert (result["skipped"], result["shards"]) == (2, 10)
    assert files_of(killed) == files_of(unbroken)
    assert verify(str(killed)) == []  # the records of what was finished are gone


def test_the_manifest_is_written_last(idx_folder, tmp_path, monkeypatch):
    order = []
    write = storage.write_bytes

    def watched(uri, content):
        order.append(Path(str(uri)).name)
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", watched)
    build("mnist", str(idx_folder), str(tmp_path / "out"), shard_size=10)
    assert order[-1] == "manifest.json"
    assert order.count("manifest.json") == 1


def test_a_shard_that_cannot_be_seen_from_here_is_reported(idx_folder, tmp_path, monkeypatch):
    """As where each node of a cluster writes to a disk of its own."""
    real = building.write_shard

    def elsewhere(job):
        written = real(job)
        if written.shard.key == "train/shard-00001.tar":
            (Path(job.out) / written.shard.key).unlink()
        return written

    monkeypatch.setattr(building, "write_shard", elsewhere)
    with pytest.raises(UserError, match=r"has no train/shard-00001\.tar, though a worker wrote it"):
        build("mnist", str(idx_folder), str(tmp_path / "out"), shard_size=10)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_bytes_do_not_depend_on_the_number_of_workers(idx_folder, tmp_path, ray_cluster):
    for workers in (0, 2):
        build("mnist", str(idx_folder), str(tmp_path / str(workers)), workers, shard_size=4)
    assert files_of(tmp_path / "2") == files_of(tmp_path / "0")
    assert len(files_of(tmp_path / "0")) == 10 + 3 + 2  # shards, contact sheets, table, manifest


def test_a_mistake_found_in_a_task_is_the_same_sentence(faces, tmp_path, ray_cluster):
    folder = faces(tmp_path / "wild", size=(200, 300))
    with pytest.raises(UserError) as error:
        build("celeba", str(folder), str(tmp_path / "out"), 2)
    assert "has (200, 300) pixels instead of (178, 218)" in str(error.value)
    assert "\n" not in str(error.value)
    assert type(error.value) is UserError


def test_a_cluster_that_does_not_answer_is_reported_at_once(idx_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"No Ray cluster answers at RAY_ADDRESS 127\.0\.0\.1:9"):
        build("mnist", str(idx_folder), str(tmp_path / "out"), workers=2)


# The command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["digits"], "build.py needs --out, a folder or s3:// URI for the data set."),
        (
            ["digits", "--out", "x", "--source", "y"],
            "The digits come with scikit-learn: leave --so",
        ),
        (["digits", "--out", "x", "--workers", "-1"], "--workers is -1, but must be 0 or more."),
        (
            ["digits", "--out", "x", "--shard-size", "0"],
            "--shard-size is 0, but must be at least 1",
        ),
        (["mnist", "--out", "x", "--limit", "3"], "--limit means nothing for mnist: leave it out."),
        (["mnist", "--out", "x"], "mnist needs --source: the folder or s3:// URI of the four IDX "),
        (
            ["mnist", "--out", "x", "--source", "/no/where"],
            "There is no train-images-idx3-ubyte.gz",
        ),
        (
            ["celeba", "--out", "x"],
            "celeba needs --source: the folder or s3:// URI that holds img_",
        ),
        (["digits", "--out", "ftp://x"], "ftp://x has an unknown scheme: give a local path, file:"),
    ],
)
def test_a_wrong_argument_ends_with_its_sentence(
    arguments, sentence, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        command()
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.err.startswith(sentence)
    assert output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_program_builds_and_answers_in_json(idx_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["mnist", "--source", idx_folder, "--out", out, "--workers", "0", "--json"]
    plan = program(*arguments, "--dry-run")
    assert plan.returncode == 0
    assert json.loads(plan.stdout.splitlines()[-1])["already_built"] is False
    assert not out.exists()
    done = program(*arguments)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert set(answer) == {"manifest", "shards", "samples", "bytes", "skipped", "seconds"}
    assert answer["manifest"] == f"{out}/manifest.json"
    assert answer["samples"] == 34
    wrong = program("mnist", "--source", tmp_path, "--out", tmp_path / "other", "--workers", "0")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("There is no train-images-idx3-ubyte.gz or train-images")
    assert wrong.stderr.count("\n") == 1


def test_the_program_starts_its_own_ray(idx_folder, tmp_path):
    done = program("mnist", "--source", idx_folder, "--out", tmp_path / "out", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert verify(str(tmp_path / "out")) == []


# An object store


def test_from_a_bucket_to_a_bucket_and_back(s3, idx_folder, face_folder, tmp_path):
    local = tmp_path / "local"
    build("mnist", str(idx_folder), str(local), shard_size=10)
    storage.upload_folder(idx_folder, f"{s3}/raw/digits")
    result = build("mnist", f"{s3}/raw/digits", f"{s3}/built/digits", shard_size=10)
    assert result["manifest"] == f"{s3}/built/digits/manifest.json"
    storage.download_folder(f"{s3}/built/digits", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(local)
    assert build("mnist", f"{s3}/raw/digits", f"{s3}/built/digits", shard_size=10)["skipped"] == 5
    assert verify(f"{s3}/built/digits") == []
    ours = load_split(str(local), "train", tmp_path / "cache")
    theirs = load_split(f"{s3}/built/digits", "train", tmp_path / "cache-s3")
    np.testing.assert_array_equal(ours.images, theirs.images)
    storage.upload_folder(face_folder, f"{s3}/raw/faces")  # the zip is read in place
    build("celeba", f"{s3}/raw/faces", f"{s3}/built/faces")
    build("celeba", str(face_folder), str(tmp_path / "faces-here"))
    assert read_manifest(f"{s3}/built/faces") == read_manifest(str(tmp_path / "faces-here"))


def test_ray_tasks_write_to_the_bucket(s3, idx_folder, ray_cluster):
    build("mnist", str(idx_folder), f"{s3}/out", workers=2, shard_size=10)
    assert verify(f"{s3}/out") == []
