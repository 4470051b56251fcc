"""Shards are the same bytes every time, and the manifest refuses what it does not know."""

import dataclasses
import hashlib
import io
import json
import tarfile
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from ivegan import shards, storage
from ivegan.errors import UserError
from ivegan.shards import Manifest, Sample, Shard

RNG = np.random.default_rng(0)


def samples(count: int = 5, shape: tuple[int, int, int] = (3, 6, 4)) -> list[Sample]:
    images = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
    return [
        Sample(f"{i:06d}", image, {"source": f"raw#{i}", "label": i})
        for i, image in enumerate(images)
    ]


def manifest(**changes) -> Manifest:
    base = Manifest(
        dataset="digits",
        image_shape=(1, 16, 16),
        splits={"train": 3, "valid": 0},
        shards=(Shard(split="train", key="train/shard-00000.tar", samples=3, bytes=9, sha256="a"),),
        sources={"raw": "b"},
        settings={"shard_size": 3},
        settings_hash=shards.settings_hash({"shard_size": 3}),
        label_names=("0", "1"),
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 4)])
def test_samples_come_back_exactly(shape):
    wrote = samples(shape=shape)
    read = list(shards.read_tar(shards.write_tar(wrote)))
    assert [(s.key, s.meta) for s in read] == [(s.key, s.meta) for s in wrote]
    for one, other in zip(wrote, read, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_the_same_samples_are_the_same_bytes(monkeypatch):
    wrote = samples()
    first = shards.write_tar(wrote)
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert shards.write_tar(wrote) == first
    assert shards.write_tar(wrote[::-1]) != first


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it closes late
def test_webdataset_reads_our_tars(tmp_path):
    wrote = samples()
    (tmp_path / "shard-00000.tar").write_bytes(shards.write_tar(wrote))
    pattern = str(tmp_path / "shard-00000.tar")
    dataset: Any = WebDataset(pattern, shardshuffle=False).decode("rgb8")
    for ours, theirs in zip(wrote, dataset, strict=True):
        assert theirs["__key__"] == ours.key
        assert theirs["json"] == ours.meta
        np.testing.assert_array_equal(theirs["png"].transpose(2, 0, 1), ours.image)


def test_a_damaged_tar_is_refused():
    data = shards.write_tar(samples())
    for broken in (data[:1500], b"not a tar at all", data[:520] + b"\xff" + data[521:]):
        with pytest.raises(UserError, match=r"^The tar "):
            list(shards.read_tar(broken))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a.json", "b.png"], "holds b without its other half"),
        (["a.json", "a.png", "b.json"], "ends in the middle of a sample"),
        (["a.json", "a.exe"], "holds a.exe, which is no part of a sample"),
    ],
)
def test_a_tar_of_something_else_is_refused(names, sentence):
    contents = {"json": b"{}", "png": shards.encode(samples(1)[0].image), "exe": b""}
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as tar:
        for name in names:
            entry = tarfile.TarInfo(name)
            content = contents[name.partition(".")[2]]
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(UserError, match=sentence):
        list(shards.read_tar(into.getvalue()))


def test_the_manifest_comes_back_and_its_hash_is_the_files(tmp_path):
    uri = str(tmp_path)
    shards.write_manifest(uri, manifest())
    assert shards.read_manifest(uri) == manifest()
    raw = (tmp_path / "manifest.json").read_bytes()
    assert shards.read_manifest(uri).hash == hashlib.sha256(raw).hexdigest()
    assert manifest(splits={"train": 4, "valid": 0}).hash != manifest().hash


def test_no_manifest_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"There is no data set at .*: build it with data_prep"):
        shards.read_manifest(str(tmp_path))


def test_a_manifest_of_another_version_is_refused(tmp_path):
    shards.write_manifest(str(tmp_path), manifest(schema_version=2))
    with pytest.raises(UserError, match="has schema version 2, but this program reads version 1"):
        shards.read_manifest(str(tmp_path))


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"schema_version": 1}', "\0"])
def test_a_damaged_manifest_is_refused(tmp_path, broken):
    (tmp_path / "manifest.json").write_text(broken)
    with pytest.raises(UserError, match="is damaged"):
        shards.read_manifest(str(tmp_path))


def test_a_manifest_with_an_unknown_field_is_refused(tmp_path):
    values = json.loads(shards.to_json(manifest())) | {"colour": "red"}
    storage.write_bytes(tmp_path / "manifest.json", json.dumps(values).encode())
    with pytest.raises(UserError, match="colour"):
        shards.read_manifest(str(tmp_path))


def test_an_empty_data_set_is_refused(tmp_path):
    shards.write_manifest(str(tmp_path), manifest(splits={"train": 0}, shards=()))
    with pytest.raises(UserError, match=r"The data set at .* is empty"):
        shards.read_manifest(str(tmp_path))
