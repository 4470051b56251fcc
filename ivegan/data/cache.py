"""The node's cache: each split is decoded once per node, into arrays that its ranks share.

The arrays are memory-mapped files in a folder that is named by the manifest's hash, so that a data
set that is built anew is decoded anew.
"""

import logging
import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ivegan import order
from ivegan.config import Config
from ivegan.data.manifest import Manifest, read_split_manifest
from ivegan.data.tars import read_shard
from ivegan.errors import UserError
from ivegan.shapes import Int, UInt8
from ivegan.storage import local_sentences
from ivegan.storage.digest import is_sound, write_sums
from ivegan.storage.local import lock

log = logging.getLogger(__name__)

CACHE_LIMIT = 200_000_000_000
"""Bytes of decoded images that a node keeps by default; a full disk is another limit."""

_MAX_THREADS = 8  # each holds one shard; decoding and digests run outside Python's lock
_HASH_DIGITS = 64


@dataclass(frozen=True, kw_only=True)
class Split:
    """All samples of one split, in the order of the shards."""

    images: UInt8[np.ndarray, "n c h w"]
    labels: Int[np.ndarray, "n ..."]
    """Class numbers (n,), or one column of 0 and 1 per attribute (n, 40)."""
    keys: Sequence[str] | np.ndarray
    dataset_hash: str
    """Hash of the manifest."""

    def batch(
        self, config: Config, step: int, rank: int, world_size: int
    ) -> UInt8[Tensor, "n c h w"]:
        """Return a rank's slice of one global batch."""
        indices = order.batch_indices(
            config.seed, len(self.images), config.batch_size, step, rank, world_size
        )
        return torch.from_numpy(self.images[indices])


def load_split(
    data_uri: str,
    split: str,
    cache_dir: str | Path,
    *,
    skip_bad: bool = False,
    limit: float = CACHE_LIMIT,
) -> Split:
    """Return one split of the data set at the URI, after decoding it if this node has not yet.

    Args:
        data_uri: a data set that ``data_prep/build.py`` wrote.
        split: ``train``, ``valid`` or ``test``.
        cache_dir: a folder of this node. One process fills it while the others wait.
        skip_bad: leave out, and log, samples that differ from the manifest.
        limit: bytes that all cached data sets may take; the least recently used are deleted first.

    Raises:
        UserError: no such data set or split, a shard that differs from the manifest, or no room.
    """
    manifest = read_split_manifest(data_uri, split)
    root = Path(cache_dir).absolute()
    with local_sentences(root):
        root.mkdir(parents=True, exist_ok=True)
        dataset_folder = root / manifest.hash
        with lock(root / f"{manifest.hash}.lock"):
            dataset_folder.mkdir(exist_ok=True)
            # A folder appears by one renaming, so an existing one is complete.
            folder = dataset_folder / split
            if not is_sound(folder) and skip_bad:
                folder = dataset_folder / f"{split}-without-bad"
            if not is_sound(folder):
                partial = folder.with_name(f"{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                bytes_needed = manifest.splits[split] * math.prod(manifest.image_shape)
                _make_room(root, manifest.hash, bytes_needed, limit)
                partial.mkdir()
                _decode_split(data_uri, manifest, split, partial, skip_bad)
                partial.rename(folder)
            os.utime(dataset_folder)
            labels = np.load(folder / "labels.npy")
            return Split(
                images=np.load(folder / "images.npy", mmap_mode="r")[: len(labels)],
                labels=labels,
                keys=np.load(folder / "keys.npy", mmap_mode="r"),
                dataset_hash=manifest.hash,
            )


def _make_room(root: Path, keep: str, needed: int, limit: float) -> None:
    """Delete the least recently used data sets of a cache until there is room for one more."""
    others = [path for path in root.iterdir() if len(path.name) == _HASH_DIGITS and path.is_dir()]
    sizes = {path: sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) for path in others}
    others = sorted((p for p in others if p.name != keep), key=lambda path: path.stat().st_mtime)
    while sum(sizes.values()) + needed > limit or shutil.disk_usage(root).free < needed:
        if not others:
            free = shutil.disk_usage(root).free
            raise UserError(
                f"Decoding {keep[:12]}… takes {needed / 1e9:.3g} GB, but {root} may hold "
                f"{limit / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB free: train with "
                "--stream, give --cache-gb, or set IVEGAN_CACHE to a folder of a larger disk."
            )
        oldest = others.pop(0)
        with lock(root / f"{oldest.name}.lock", wait=False) as locked:
            if locked:  # processes that have mapped its arrays keep them
                log.info("deleting %s from the cache to make room", oldest)
                shutil.rmtree(oldest)
                del sizes[oldest]


def _decode_split(
    data_uri: str, manifest: Manifest, split: str, folder: Path, skip_bad: bool
) -> None:
    """Write ``images.npy``, ``labels.npy`` and ``keys.npy`` of one split into the folder."""
    shards = manifest.of_split(split)
    total = sum(shard.samples for shard in shards)
    log.info("decoding %d images of %s/%s", total, data_uri, split)
    images = _new_array(folder / "images.npy", (total, *manifest.image_shape))
    starts = np.cumsum([0] + [shard.samples for shard in shards])

    def decode(number: int) -> tuple[list[str], list[object]]:
        shard = shards[number]
        samples = read_shard(data_uri, shard, manifest.image_shape, skip_bad=skip_bad)
        for index, sample in enumerate(samples, start=starts[number]):
            images[index] = sample.image
        metas = [sample.meta for sample in samples]
        labels = [meta["label"] if "label" in meta else meta["attributes"] for meta in metas]
        return [sample.key for sample in samples], labels

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        decoded = list(pool.map(decode, range(len(shards))))
    end = 0
    for start, (keys, _) in zip(starts, decoded, strict=False):
        if start != end:  # images before it were left out: close the gap
            images[end : end + len(keys)] = images[start : start + len(keys)]
        end += len(keys)
    if not end:
        raise UserError("No sample of the split can be read: build the data set again.")
    images.flush()
    labels = np.array([label for _, column in decoded for label in column], dtype=np.int64)
    np.save(folder / "labels.npy", labels)
    np.save(folder / "keys.npy", np.array([key for keys, _ in decoded for key in keys]))
    write_sums(folder)


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Return a new memory-mapped file of bytes whose space on the disk is allocated."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        raise UserError(
            f"There is no room for {path.stat().st_size / 1e9:.3g} GB at {path.parent} "
            f"({error.strerror}): train with --stream, or set IVEGAN_CACHE to a larger disk."
        ) from error
    return array
