"""Whatever is wrong with a data set is named."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from datasets import flip

from data_prep import verify as verify_module
from data_prep.verify import verify
from ivegan.data.manifest import read_manifest, write_manifest

TRAIN, CONTACT = "train/shard-00000.tar", "contact-test.png"


@pytest.fixture
def dataset(digits_dataset, tmp_path) -> Path:
    return Path(shutil.copytree(digits_dataset, tmp_path / "dataset"))


def lie(dataset: Path, **changes) -> None:
    manifest = read_manifest(str(dataset))
    write_manifest(str(dataset), dataclasses.replace(manifest, **changes))


def lie_of_first_shard(dataset: Path, **changes) -> None:
    manifest = read_manifest(str(dataset))
    first, *others = manifest.shards
    lying = dataclasses.replace(first, **changes)
    splits = {**manifest.splits, "train": 1347 + lying.samples - first.samples}
    lie(dataset, shards=(lying, *others), splits=splits)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda d: flip(d / TRAIN, 3 * 512 + 60),
            r"is not the one of the manifest \(wrong sha256\)",
        ),
        (lambda d: (d / TRAIN).write_bytes(b"short"), "is not the one of .*: The tar is damaged"),
        (lambda d: (d / TRAIN).unlink(), f"^{TRAIN} is missing."),
        (lambda d: (d / "notes").touch(), "notes does not belong to the data set."),
        (lambda d: lie_of_first_shard(d, samples=999), f"{TRAIN} does not hold 999 images of shap"),
        (lambda d: lie(d, settings={"other": 1}), "manifest.json holds settings of another hash"),
        (lambda d: (d / "samples.parquet").unlink(), "samples.parquet is missing."),
        (lambda d: (d / CONTACT).write_bytes(b"other"), f"{CONTACT} has another sha256 than the"),
    ],
)
def test_what_is_wrong_is_named(dataset, spoil, sentence):
    spoil(dataset)
    assert any(re.search(sentence, line) for line in verify(str(dataset)))


def test_a_shard_listed_twice_repeats_keys(dataset):
    manifest = read_manifest(str(dataset))
    splits = {**manifest.splits, "test": 600}
    lie(dataset, shards=(*manifest.shards, manifest.shards[-1]), splits=splits)
    assert any("stand in the data set twice" in line for line in verify(str(dataset)))


def test_the_command_ends_with_1_if_anything_is_wrong(dataset, capsys, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(dataset), "--json"])
    for code, ending in ((0, "OK: 1797 samples in 4 shards"), (1, f"{TRAIN} is missing.")):
        with pytest.raises(SystemExit) as stop:
            verify_module.command()
        lines = capsys.readouterr().out.splitlines()
        assert stop.value.code == code
        assert lines[-2] == ending
        assert json.loads(lines[-1])["wrong"] == ([] if code == 0 else [ending])
        (dataset / TRAIN).unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(dataset / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        verify_module.command()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("There is no data set at")
