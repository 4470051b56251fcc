"""Raw files become the same shards every time, or a sentence says why not."""

import shutil
import sys
from pathlib import Path

import pytest
from datasets import files_of

from data_prep import building
from data_prep.build import Build, command, main
from data_prep.building import build, make_plan, write_shard
from data_prep.verify import verify
from ivegan import storage
from ivegan.data.manifest import read_manifest
from ivegan.errors import UserError

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
    storage.write_bytes(plan.marker, plan.identity)
    for job in plan.jobs[:3]:
        write_shard(plan, job)
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


def test_lost_shards_of_a_finished_data_set_are_written_again(idx_folder, tmp_path):
    out = tmp_path / "out"
    build("mnist", str(idx_folder), str(out), shard_size=4)
    before = files_of(out)
    (out / "train" / "shard-00000.tar").unlink()
    (out / "train" / "shard-00001.tar").write_bytes(b"cut off")
    result = build("mnist", str(idx_folder), str(out), shard_size=4)
    assert (result["skipped"], result["shards"]) == (8, 10)
    assert files_of(out) == before


def test_a_shard_that_cannot_be_seen_from_here_is_reported(idx_folder, tmp_path, monkeypatch):
    """As where each node of a cluster writes to a disk of its own."""
    real = building.write_shard

    def elsewhere(plan, job):
        written = real(plan, job)
        if job.key == "train/shard-00001.tar":
            Path(plan.out, job.key).unlink()
        return written

    monkeypatch.setattr(building, "write_shard", elsewhere)
    with pytest.raises(UserError, match=r"has no train/shard-00001\.tar, though a worker wrote it"):
        build("mnist", str(idx_folder), str(tmp_path / "out"), shard_size=10)
    assert not (tmp_path / "out" / "manifest.json").exists()


# The command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("digits", "build.py needs --out, a folder or s3:// URI for the data set."),
        ("digits --out x --source y", "The digits come with scikit-learn: leave --so"),
        ("digits --out x --shard-size 0", "--shard-size is 0, but must be at least 1"),
        ("mnist --out x --limit 3", "--limit means nothing for mnist: leave it out."),
        ("mnist --out x", "mnist needs --source: the folder or s3:// URI of the four IDX "),
        ("celeba --out x", "celeba needs --source: the folder or s3:// URI that holds img_"),
    ],
)
def test_a_wrong_argument_ends_with_its_sentence(
    arguments, sentence, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["build.py", *arguments.split()])
    with pytest.raises(SystemExit) as stop:
        command()
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.err.startswith(sentence)
    assert output.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_builds_nothing(idx_folder, tmp_path):
    out = tmp_path / "out"
    plan = main(Build(dataset="mnist", source=str(idx_folder), out=str(out), dry_run=True))
    assert plan["already_built"] is False
    assert plan["splits"] == {"train": 22, "valid": 2, "test": 10}
    assert not out.exists()
