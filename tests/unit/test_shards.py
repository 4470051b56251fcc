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

from ivegan import storage
from ivegan.data.manifest import Manifest, Shard, read_manifest, to_json, write_manifest
from ivegan.data.tars import Sample, decode, encode, read_tar, salvage_tar, write_tar
from ivegan.digest import digest
from ivegan.errors import UserError

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
        settings_hash=digest({"shard_size": 3}),
        label_names=("0", "1"),
    )
    return dataclasses.replace(base, **changes)


def tar(wrote: list[Sample]) -> bytes:
    return write_tar(wrote)[0]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 4)])
def test_samples_come_back_exactly(shape):
    wrote = samples(shape=shape)
    read = list(read_tar(tar(wrote)))
    assert [(s.key, s.meta) for s in read] == [(s.key, s.meta) for s in wrote]
    for one, other in zip(wrote, read, strict=True):
        np.testing.assert_array_equal(one.image, other.image)


def test_the_same_samples_are_the_same_bytes(monkeypatch):
    wrote = samples()
    first = tar(wrote)
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert tar(wrote) == first
    assert tar(wrote[::-1]) != first


def test_the_tar_is_the_one_that_tarfile_writes():
    wrote = samples()
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w", format=tarfile.USTAR_FORMAT) as theirs:
        for entry, content in entries(tar(wrote)):
            fresh = tarfile.TarInfo(entry.name)
            fresh.size = len(content)
            theirs.addfile(fresh, io.BytesIO(content))
    ours = tar(wrote)
    assert into.getvalue().rstrip(b"\0") == ours.rstrip(b"\0")
    assert ours.endswith(bytes(1024))


def entries(data: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = [(entry, archive.extractfile(entry)) for entry in archive]
        return [(entry, file.read()) for entry, file in found if file is not None]


def test_rows_say_where_each_image_is():
    wrote = samples()
    data, rows = write_tar(wrote)
    for sample, row in zip(wrote, rows, strict=True):
        assert (row.key, row.meta) == (sample.key, sample.meta)
        image = decode(data[row.offset : row.offset + row.bytes])
        np.testing.assert_array_equal(image, sample.image)


def test_any_reader_of_npy_files_reads_our_images():
    image = samples(1)[0].image
    np.testing.assert_array_equal(np.load(io.BytesIO(encode(image))), image)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 2, 2), np.float32),
        np.zeros((2, 2), np.uint8),
        np.zeros((3, 2, 2), object),
        np.asfortranarray(np.zeros((3, 2, 2), np.uint8)),
    ],
    ids=["float32", "two dimensions", "objects", "Fortran order"],
)
def test_an_array_that_is_no_image_is_refused(array):
    file = io.BytesIO()
    np.save(file, array)
    with pytest.raises(UserError, match=r"it is no uint8 \(c, h, w\)"):
        decode(file.getvalue())


def test_what_is_no_array_is_refused():
    good = encode(samples(1)[0].image)
    for broken in (b"", good[:9], good[:100], good[:-1], good + b"x", b"\x89PNG" + good[4:]):
        with pytest.raises(UserError, match="An image of the tar is damaged"):
            decode(broken)


def test_a_damaged_tar_gives_back_what_is_whole():
    wrote = samples(5)
    data, rows = write_tar(wrote)
    assert salvage_tar(data)[1] == []

    def flipped(place: int) -> bytes:
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    for place, missing in (
        (rows[1].offset + rows[1].bytes - 1, 1),  # a pixel
        (data.index(b'"label":2') + 8, 2),  # a label
        (data.index(b'"crc32":', rows[3].offset) + 10, 3),  # a check sum
    ):
        good, wrong = salvage_tar(flipped(place))
        assert wrong == [wrote[missing].key]
        assert [s.key for s in good] == [s.key for s in wrote if s.key != wrote[missing].key]
    good, wrong = salvage_tar(data[: rows[3].offset + 100])
    assert [s.key for s in good] == [s.key for s in wrote[:3]]
    assert len(wrong) == 1
    assert wrong[0].startswith("The tar ")
    assert salvage_tar(b"")[0] == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it closes late
def test_webdataset_reads_our_tars(tmp_path):
    wrote = samples()
    (tmp_path / "shard-00000.tar").write_bytes(tar(wrote))
    pattern = str(tmp_path / "shard-00000.tar")
    dataset: Any = WebDataset(pattern, shardshuffle=False).decode()
    for ours, theirs in zip(wrote, dataset, strict=True):
        assert theirs["__key__"] == ours.key
        assert theirs["json"].items() >= ours.meta.items()
        np.testing.assert_array_equal(theirs["npy"], ours.image)


def test_a_damaged_tar_is_refused():
    data = tar(samples())
    for broken in (data[:1500], b"not a tar at all", data[:520] + b"\xff" + data[521:]):
        with pytest.raises(UserError, match=r"^(The|An image of the) tar "):
            list(read_tar(broken))


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a.npy", "b.json"], "holds b without its other half"),
        (["a.json", "a.npy"], "holds a without its other half"),
        (["a.npy", "b.npy"], "holds b without its other half"),
        (["a.npy", "a.json", "b.npy"], "ends in the middle of a sample"),
        (["a.npy", "a.exe"], "holds a.exe, which is no part of a sample"),
    ],
)
def test_a_tar_of_something_else_is_refused(names, sentence):
    contents = {"json": b'{"crc32": 0}', "npy": encode(samples(1)[0].image), "exe": b""}
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            content = contents[name.partition(".")[2]]
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    with pytest.raises(UserError, match=sentence):
        list(read_tar(into.getvalue()))


def test_the_manifest_comes_back_and_its_hash_is_the_files(tmp_path):
    uri = str(tmp_path)
    write_manifest(uri, manifest())
    assert read_manifest(uri) == manifest()
    raw = (tmp_path / "manifest.json").read_bytes()
    assert read_manifest(uri).hash == hashlib.sha256(raw).hexdigest()
    assert manifest(settings={"other": 1}).hash != manifest().hash


def test_no_manifest_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"There is no data set at .*: build it with data_prep"):
        read_manifest(str(tmp_path))


def test_a_manifest_of_another_version_is_refused(tmp_path):
    write_manifest(str(tmp_path), manifest(schema_version=1))
    with pytest.raises(UserError, match="has schema version 1, but this program reads version 2"):
        read_manifest(str(tmp_path))


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"schema_version": 2}', "\0"])
def test_a_damaged_manifest_is_refused(tmp_path, broken):
    (tmp_path / "manifest.json").write_text(broken)
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(str(tmp_path))


def test_a_manifest_with_an_unknown_field_is_refused(tmp_path):
    values = json.loads(to_json(manifest())) | {"colour": "red"}
    storage.write_bytes(tmp_path / "manifest.json", json.dumps(values).encode())
    with pytest.raises(UserError, match="colour"):
        read_manifest(str(tmp_path))


def test_an_empty_data_set_is_refused(tmp_path):
    write_manifest(str(tmp_path), manifest(splits={"train": 0}, shards=()))
    with pytest.raises(UserError, match=r"The data set at .* is empty"):
        read_manifest(str(tmp_path))
