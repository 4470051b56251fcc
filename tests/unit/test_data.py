"""A split is decoded once, exactly, and only from shards that are what the manifest says."""

import dataclasses
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import change_manifest, flip

from ivegan import order
from ivegan.config import override, preset
from ivegan.data import cache
from ivegan.data.batches import batches
from ivegan.data.cache import load_split
from ivegan.data.manifest import read_manifest
from ivegan.data.tars import read_tar
from ivegan.errors import UserError
from ivegan.transforms import to_float


def test_a_split_is_every_sample_of_its_shards_in_order(digits_dataset, tmp_path):
    manifest = read_manifest(digits_dataset)
    for split, count in manifest.splits.items():
        found = load_split(digits_dataset, split, tmp_path)
        assert found.images.shape == (count, 1, 16, 16)
        assert found.images.dtype == np.uint8
        assert found.labels.dtype == np.int64
        assert found.dataset_hash == manifest.hash
        samples = itertools.chain.from_iterable(
            read_tar((Path(digits_dataset) / shard.key).read_bytes())
            for shard in manifest.of_split(split)
        )
        for place, sample in enumerate(samples):
            np.testing.assert_array_equal(found.images[place], sample.image)
            assert found.labels[place] == sample.meta["label"]
            assert found.keys[place] == sample.key


def test_the_second_load_does_not_read_the_shards(digits_copy, tmp_path):
    first = load_split(str(digits_copy), "valid", tmp_path / "cache")
    shutil.rmtree(digits_copy / "valid")
    second = load_split(str(digits_copy), "valid", tmp_path / "cache")
    np.testing.assert_array_equal(first.images, second.images)
    assert isinstance(second.images, np.memmap)


def test_a_damaged_cache_is_decoded_again_and_a_copied_one_is_not(digits_dataset, tmp_path, caplog):
    images = load_split(digits_dataset, "valid", tmp_path / "a").images.copy()
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    load_split(digits_dataset, "valid", tmp_path / "b")
    assert "damaged" not in caplog.text
    for name in ("images.npy", "sums.json"):
        (cached,) = tmp_path.glob(f"b/*/valid/{name}")
        flip(cached)
        again = load_split(digits_dataset, "valid", tmp_path / "b")
        np.testing.assert_array_equal(again.images, images)
        assert caplog.text.count("in the cache is damaged: making it again") == 1
        caplog.clear()


def test_another_data_set_is_another_cache(digits_copy, digits_dataset, tmp_path):
    load_split(digits_dataset, "valid", tmp_path / "cache")
    change_manifest(digits_copy, sources={"other": "files"})
    (digits_copy / "valid" / "shard-00000.tar").unlink()
    with pytest.raises(UserError, match="There is no file"):
        load_split(str(digits_copy), "valid", tmp_path / "cache")


def test_what_a_killed_process_left_is_not_taken_for_a_split(digits_dataset, tmp_path):
    digest = read_manifest(digits_dataset).hash
    partial = tmp_path / digest / "valid.partial"
    partial.mkdir(parents=True)
    (partial / "images.npy").write_bytes(b"half")
    assert len(load_split(digits_dataset, "valid", tmp_path).images) == 150
    assert not partial.exists()


def test_of_several_that_want_a_split_one_decodes_and_the_others_wait(
    digits_dataset, tmp_path, monkeypatch
):
    """Threads here: the lock is one of open files, the same within a process as between two."""
    decoded, decode = [], cache._decode_split
    monkeypatch.setattr(cache, "_decode_split", lambda *args: (decoded.append(1), decode(*args)))
    with ThreadPoolExecutor(3) as pool:
        splits = list(pool.map(lambda _: load_split(digits_dataset, "test", tmp_path), range(3)))
    assert [len(split.images) for split in splits] == [300] * 3
    assert len(decoded) == 1


def test_a_shard_that_differs_from_the_manifest_is_refused(digits_copy, tmp_path):
    with pytest.raises(UserError, match="no split 'dev'; it has test, train, valid"):
        load_split(str(digits_copy), "dev", tmp_path / "cache")
    manifest = read_manifest(str(digits_copy))
    shards = tuple(dataclasses.replace(shard, samples=999) for shard in manifest.shards)
    splits = {"train": 2 * 999, "valid": 999, "test": 999}
    for changes in ({"image_shape": (1, 8, 32)}, {"shards": shards, "splits": splits}):
        change_manifest(digits_copy, **{"image_shape": (1, 16, 16), **changes})
        with pytest.raises(UserError, match=r"shard-00000.tar does not hold \d+ images of shape"):
            load_split(str(digits_copy), "valid", tmp_path / "cache")


def test_the_ranks_batches_together_are_the_one_global_batch(digits_dataset, tmp_path):
    world_size = 4
    config = override(preset("digits"), {"batch_size": 16})
    split = load_split(digits_dataset, "train", tmp_path)
    device = torch.device("cpu")
    ranks = [
        itertools.islice(batches(config, split, 3, rank, world_size, device), 2)
        for rank in range(world_size)
    ]
    for step, parts in enumerate(zip(*ranks, strict=True), start=3):
        images = torch.cat([x for x, _ in parts])
        places = order.batch_indices(config.seed, 1347, 16, step)
        torch.testing.assert_close(images, to_float(torch.from_numpy(split.images[places])))
        noise = torch.cat([draws.noise for _, draws in parts])
        torch.testing.assert_close(noise, order.draw(config, step).noise)
