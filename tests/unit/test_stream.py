"""A stream gives every rank its share of one global batch, exactly, indefinitely, from any step."""

import dataclasses
import inspect
import itertools
import logging
import os
import shutil
from pathlib import Path
from types import GeneratorType
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import write_dataset

from ivegan import storage
from ivegan.config import override, preset
from ivegan.data.batches import _ahead, batches, first_images
from ivegan.data.cache import load_split
from ivegan.data.manifest import Shard, read_manifest
from ivegan.data.stream import Stream, _Lanes
from ivegan.data.tars import Sample, read_shard, read_tar
from ivegan.errors import UserError

SHAPE = (1, 2, 2)


def write(folder: Path, sizes: list[int]) -> str:
    """Write a data set whose every image says which one it is."""
    numbers = itertools.count()
    return write_dataset(folder, [[sample(next(numbers)) for _ in range(n)] for n in sizes])


def sample(number: int) -> Sample:
    image = np.frombuffer(number.to_bytes(4, "big"), np.uint8).reshape(SHAPE)
    return Sample(f"{number:06d}", image, {"label": 0, "source": "made"})


def stream(uri: str, **changes: Any) -> Stream:
    manifest = read_manifest(uri)
    base = Stream(data_uri=uri, manifest=manifest, split="train", loaders=0)
    return dataclasses.replace(base, **changes)


def numbers(images: torch.Tensor) -> list[int]:
    """Return which images these are."""
    return [int.from_bytes(image.tobytes(), "big") for image in images.numpy()]


def read(
    source: Stream, batch_size: int, steps: int, *, start: int = 0, world_size: int = 1, **over
) -> list[list[int]]:
    """Return the global batches of some steps, put together from all ranks."""
    config = override(preset("mnist"), {"batch_size": batch_size, **over})
    ranks = [
        itertools.islice(source.batches(config, start, rank, world_size), steps)
        for rank in range(world_size)
    ]
    return [numbers(torch.cat(parts)) for parts in zip(*ranks, strict=True)]


def test_1_2_or_4_ranks_read_the_same_global_batches(tmp_path):
    source = stream(write(tmp_path / "set", [9, 9, 9, 9, 9, 9, 9, 4]))
    alone = read(source, 32, 12, seed=5)
    assert all(len(batch) == 32 for batch in alone)
    for world_size in (2, 4):
        assert read(source, 32, 12, world_size=world_size, seed=5) == alone
    assert read(source, 32, 12, seed=6) != alone


def test_a_stream_resumes_anywhere_as_if_it_had_never_stopped(tmp_path):
    source = stream(write(tmp_path / "set", [9, 9, 9, 9, 4]))
    whole = read(source, 16, 35)
    for start in (1, 2, 7, 30):
        assert read(source, 16, 5, start=start) == whole[start : start + 5]


def test_processes_that_read_ahead_change_nothing(tmp_path):
    source = stream(write(tmp_path / "set", [12] * 8))
    ahead = dataclasses.replace(source, loaders=2)
    assert read(ahead, 16, 20, start=2) == read(source, 16, 20, start=2)


def test_batches_carry_the_same_draws_as_from_the_cache(tmp_path):
    config = override(preset("mnist"), {"batch_size": 16})
    uri = write(tmp_path / "set", [40] * 4)
    device = torch.device("cpu")
    split = load_split(uri, "train", tmp_path / "cache")
    streamed = itertools.islice(batches(config, stream(uri), 3, 1, 2, device), 3)
    cached = itertools.islice(batches(config, split, 3, 1, 2, device), 3)
    for (x, draws), (y, others) in zip(streamed, cached, strict=True):
        assert x.shape == y.shape == (8, *SHAPE)
        assert x.dtype == torch.float32
        for one, other in zip(draws, others, strict=True):
            torch.testing.assert_close(one, other)


def spoil(uri: str, shard: int, sample: int) -> str:
    """Change a pixel of one sample and return its key."""
    manifest = read_manifest(uri)
    path = Path(uri) / manifest.shards[shard].key
    raw = bytearray(path.read_bytes())
    key = list(read_tar(bytes(raw)))[sample].key
    image = raw.index(f"{key}.npy".encode()) + 512
    raw[image + 128] ^= 1  # the first byte after the header of the .npy file
    path.write_bytes(raw)
    return key


def test_an_outage_reaches_the_rank_as_one(tmp_path, monkeypatch):
    uri = write(tmp_path / "set", [12] * 4)
    monkeypatch.setattr(
        "ivegan.data.stream.read_shard", Mock(side_effect=storage.Unavailable("Away."))
    )
    with pytest.raises(storage.Unavailable):
        read(stream(uri, loaders=0), 16, 4)


def test_a_refusal_is_no_bad_sample(tmp_path, monkeypatch):
    uri = write(tmp_path / "set", [12] * 4)
    denied = Mock(side_effect=UserError("Access was denied."))
    monkeypatch.setattr(storage, "read_bytes", denied)
    shard = Shard(split="train", key="train/shard-00000.tar", samples=12, bytes=1, sha256="")
    with pytest.raises(UserError, match="denied"):
        read_shard(uri, shard, SHAPE, skip_bad=True)


def test_a_wrong_byte_stops_the_stream_with_shard_and_key(tmp_path):
    uri = write(tmp_path / "set", [12] * 4)
    key = spoil(uri, 2, 5)
    with pytest.raises(UserError) as error:
        read(stream(uri, loaders=1), 16, 4)
    assert f"shard-00002.tar is not the one of the manifest (wrong sha256; wrong in it: {key})" in (
        str(error.value)
    )
    assert "\n" not in str(error.value)


def test_a_bad_sample_is_left_out_and_counted_if_asked(tmp_path, caplog):
    uri = write(tmp_path / "set", [12] * 4)
    keys = {int(spoil(uri, shard, sample)) for shard, sample in ((2, 5), (2, 11), (0, 0))}
    with caplog.at_level(logging.WARNING):
        seen = read(stream(uri, skip_bad=True), 16, 30)
    assert {len(batch) for batch in seen} == {16}
    assert set(itertools.chain.from_iterable(seen)) == set(range(48)) - keys
    assert "shard-00002.tar: 2 of 12 samples left out" in caplog.text
    assert "shard-00000.tar: 1 of 12 samples left out" in caplog.text
    assert read(stream(uri, skip_bad=True), 16, 30, world_size=4) == seen


def test_missing_shards_are_left_out_but_not_all_of_them(tmp_path, caplog):
    uri = write(tmp_path / "set", [12] * 4)
    shards = list(Path(uri).glob("train/*.tar"))
    shards.pop(1).unlink()
    missing = set(range(48)) - set(itertools.chain(*read(stream(uri, skip_bad=True), 16, 30)))
    assert len(missing) == 12
    assert ": 12 of 12 samples left out" in caplog.text
    shards.sort()
    shards[0].write_bytes(b"")
    pictured = first_images(stream(uri, skip_bad=True), 10)  # of the next shard that is there
    assert min(numbers(torch.from_numpy(pictured))) >= 12
    for path in shards:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"No sample of .* can be read"):
        read(stream(uri, skip_bad=True), 16, 1)
    with pytest.raises(UserError, match="has no readable train sample"):
        first_images(stream(uri, skip_bad=True), 10)


def test_the_cache_leaves_out_bad_samples_if_asked_and_never_by_itself(tmp_path, caplog):
    uri, cache = write(tmp_path / "set", [12] * 4), tmp_path / "cache"
    keys = [spoil(uri, 0, 3), spoil(uri, 2, 5)]
    with pytest.raises(UserError, match=f"wrong in it: {keys[0]}"):
        load_split(uri, "train", cache)
    found = load_split(uri, "train", cache, skip_bad=True)
    kept = sorted(set(range(48)) - {int(key) for key in keys})
    assert numbers(torch.from_numpy(np.array(found.images))) == kept
    assert [int(key) for key in found.keys] == kept
    assert found.labels.shape == (46,)
    assert "shard-00000.tar: 1 of 12 samples left out" in caplog.text
    with pytest.raises(UserError, match="is not the one of the manifest"):
        load_split(uri, "train", cache)


def test_a_cache_makes_room_by_deleting_what_was_not_used_for_longest(tmp_path):
    cache = tmp_path / "cache"
    uris = [write(tmp_path / f"set{i}", [25 + i]) for i in range(3)]
    hashes = [read_manifest(uri).hash for uri in uris]
    size = [
        sum(f.stat().st_size for f in (cache / hashes[i]).rglob("*.*"))
        for i in range(2)
        if load_split(uris[i], "train", cache)
    ]
    for path, when in ((cache / hashes[0], 100), (cache / hashes[1], 50)):
        os.utime(path, (when, when))
    held = load_split(uris[1], "train", cache)  # used now, though it was the oldest
    load_split(uris[2], "train", cache, limit=size[1] + 27 * 4)
    assert [(cache / name).exists() for name in hashes] == [False, True, True]
    load_split(uris[0], "train", cache, limit=25 * 4)
    assert [(cache / name).exists() for name in hashes] == [True, False, False]
    assert numbers(torch.from_numpy(np.array(held.images))) == list(range(26))


def test_a_full_disk_or_cache_is_found_before_anything_is_decoded(tmp_path, monkeypatch):
    uri = write(tmp_path / "set", [25])
    with pytest.raises(UserError, match=r"may hold 9.9e-08 GB .*train with --stream, give --cac"):
        load_split(uri, "train", tmp_path / "cache", limit=99)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    left = tmp_path / "cache" / read_manifest(uri).hash / "train.partial"  # of a killed process
    storage.write_bytes(left / "images.npy", bytes(50))
    assert len(load_split(uri, "train", tmp_path / "cache", limit=149).images) == 25
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(UserError, match=r"There is no room .*No space left on device.*--stream"):
        load_split(uri, "train", tmp_path / "cache")
    monkeypatch.undo()
    assert len(load_split(uri, "train", tmp_path / "cache").images) == 25


def test_readers_may_be_closed_in_a_thread_of_their_own(tmp_path):
    """As the garbage collector does with those that were abandoned."""
    uri = write(tmp_path, [4, 4])
    config = override(preset("mnist"), {"batch_size": 4})
    lanes = iter(_Lanes(stream(uri), config, 0, range(2), 2))
    for reader in (lanes, _ahead(itertools.count(), 2)):
        next(reader)
        assert isinstance(reader, GeneratorType)
        pool = inspect.getgeneratorlocals(reader)["pool"]
        pool.submit(reader.close).result()
