"""Whatever is wrong with a data set is named."""

import dataclasses
import json
import re
import sys

import pytest
from datasets import change_manifest, flip

from data_prep import verify as verify_module
from data_prep.verify import verify
from ivegan.data.manifest import read_manifest
from ivegan.storage.digest import sha256_hex

TRAIN, CONTACT = "train/shard-00000.tar", "contact-test.png"


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda d: flip(d / TRAIN, 3 * 512 + 60),
            r"is not the one of the manifest \(wrong sha256\)",
        ),
        (lambda d: (d / TRAIN).unlink(), f"^{TRAIN} is missing."),
        (lambda d: change_manifest(d, settings={"other": 1}), "holds settings of another hash"),
        (lambda d: (d / "samples.parquet").unlink(), "samples.parquet is missing."),
        (lambda d: (d / CONTACT).write_bytes(b"other"), f"{CONTACT} has another sha256 than the"),
    ],
)
def test_what_is_wrong_is_named(digits_copy, spoil, sentence):
    spoil(digits_copy)
    assert any(re.search(sentence, line) for line in verify(str(digits_copy)))


def test_a_shard_that_is_no_tar_is_named_though_the_manifest_has_its_sum(digits_copy):
    content = b"no tar" * 500
    (digits_copy / TRAIN).write_bytes(content)
    first, *others = read_manifest(str(digits_copy)).shards
    assert first.key == TRAIN
    changed = dataclasses.replace(first, bytes=len(content), sha256=sha256_hex(content))
    change_manifest(digits_copy, shards=(changed, *others))
    (wrong,) = verify(str(digits_copy))
    assert "The tar is damaged" in wrong


def test_a_shard_listed_twice_repeats_keys(digits_copy):
    manifest = read_manifest(str(digits_copy))
    splits = {**manifest.splits, "test": 600}
    change_manifest(digits_copy, shards=(*manifest.shards, manifest.shards[-1]), splits=splits)
    assert any("stand in the data set twice" in line for line in verify(str(digits_copy)))


def test_the_command_ends_with_1_if_anything_is_wrong(digits_copy, capsys, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(digits_copy), "--json"])
    for code, ending in ((0, "OK: 1797 samples in 4 shards"), (1, f"{TRAIN} is missing.")):
        with pytest.raises(SystemExit) as stop:
            verify_module.command()
        lines = capsys.readouterr().out.splitlines()
        assert stop.value.code == code
        assert lines[-2] == ending
        assert json.loads(lines[-1])["wrong"] == ([] if code == 0 else [ending])
        (digits_copy / TRAIN).unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(digits_copy / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        verify_module.command()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("There is no data set at")
