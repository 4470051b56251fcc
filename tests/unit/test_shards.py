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

from ivegan.data.manifest import Manifest, Shard, read_manifest, to_json, write_manifest
from ivegan.data.tars import Sample, decode, encode, read_tar, salvage_tar, write_tar
from ivegan.errors import UserError
from ivegan.storage.digest import digest


def samples(count: int = 5) -> list[Sample]:
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 6, 4), dtype=np.uint8)
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


def tar(files: dict[str, bytes]) -> bytes:
    """Return a tar as tarfile writes it by itself."""
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return into.getvalue()


def test_samples_come_back_exactly_and_rows_lead_to_them():
    data, rows = write_tar(samples())
    for sample, read, row in zip(samples(), read_tar(data), rows, strict=True):
        assert (read.key, read.meta) == (row.key, row.meta) == (sample.key, sample.meta)
        np.testing.assert_array_equal(read.image, sample.image)
        image = decode(data[row.offset : row.offset + row.bytes])
        np.testing.assert_array_equal(image, sample.image)


def test_what_is_no_image_is_refused():
    image = np.zeros((3, 2, 2), np.uint8)
    for array in (image.astype(np.float32), image[0], image.astype(object), image.T):
        file = io.BytesIO()
        np.save(file, array)
        with pytest.raises(UserError, match=r"it is no uint8 \(c, h, w\)"):
            decode(file.getvalue())
    good = encode(image)
    for broken in (b"", good[:100], good[:-1], good + b"x"):
        with pytest.raises(UserError, match="An image of the tar is damaged"):
            decode(broken)


def test_a_damaged_tar_gives_back_what_is_whole():
    keys = [sample.key for sample in samples()]
    data, rows = write_tar(samples())
    assert salvage_tar(data)[1] == []
    for place, missing in (
        (rows[1].offset + rows[1].bytes - 1, 1),  # a pixel
        (data.index(b'"label":2') + 8, 2),  # a label
        (data.index(b'"crc32":', rows[3].offset) + 10, 3),  # a check sum
    ):
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        good, wrong = salvage_tar(flipped)
        assert wrong == [keys[missing]]
        assert [s.key for s in good] == [key for key in keys if key != keys[missing]]
    good, wrong = salvage_tar(data[: rows[3].offset + 100])
    assert [s.key for s in good] == keys[:3]
    assert len(wrong) == 1
    assert wrong[0].startswith("The tar ")
    with pytest.raises(UserError, match="The tar is damaged or cut off"):
        list(read_tar(data[:1500]))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it closes late
def test_webdataset_reads_our_tars(tmp_path):
    path = tmp_path / "shard-00000.tar"
    path.write_bytes(write_tar(samples())[0])
    dataset: Any = WebDataset(str(path), shardshuffle=False).decode()
    for ours, theirs in zip(samples(), dataset, strict=True):
        assert theirs["__key__"] == ours.key
        assert theirs["json"].items() >= ours.meta.items()
        np.testing.assert_array_equal(theirs["npy"], ours.image)


@pytest.mark.parametrize("names", ["a.npy b.json", "a.npy", "a.npy a.exe"])
def test_a_tar_of_something_else_is_refused(names):
    contents = {"json": b'{"crc32": 0}', "npy": encode(samples(1)[0].image), "exe": b""}
    data = tar({name: contents[name[2:]] for name in names.split()})
    with pytest.raises(UserError, match=r"^The tar holds a\.\w+, then .*, not the two files of a"):
        list(read_tar(data))


def test_the_manifest_comes_back_and_its_hash_is_the_files(tmp_path):
    uri = str(tmp_path)
    write_manifest(uri, manifest())
    assert read_manifest(uri) == manifest()
    raw = (tmp_path / "manifest.json").read_bytes()
    assert read_manifest(uri).hash == hashlib.sha256(raw).hexdigest()
    assert manifest(settings={"other": 1}).hash != manifest().hash


KNOWN = json.loads(to_json(manifest()))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "There is no data set at .*: build it with data_prep"),
        ("{}", "is damaged"),
        (json.dumps(KNOWN | {"colour": "red"}), "is damaged .*colour"),
        (json.dumps(KNOWN | {"schema_version": 1}), "has schema version 1, but this program reads"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_manifest(str(tmp_path))
