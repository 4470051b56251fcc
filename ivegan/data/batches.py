"""Shards to batches, through a node's cache or as a stream.

Cache: each split is decoded once per node, into arrays that its ranks share. They are memory-mapped
files in a cache folder, keyed by the manifest's hash, so that a data set built anew is decoded
anew. Stream: for data that fit on no disk, shards are read ahead in processes of their own. Which
sample stands where in a batch is ``order``'s to say in both.
"""

import fcntl
import itertools
import logging
import math
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ivegan import order, storage
from ivegan.config import Config
from ivegan.data import shards
from ivegan.errors import UserError
from ivegan.shapes import Int, UInt8
from ivegan.transforms import to_float

log = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_LIMIT = 200_000_000_000
"""Bytes of decoded images that a node keeps by default; a full disk is another limit."""

_MAX_THREADS = 8  # each holds one shard; decoding and digests run outside Python's lock
_BATCHES_AHEAD = 2
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
        places = order.batch_indices(
            config.seed, len(self.images), config.batch_size, step, rank, world_size
        )
        return torch.from_numpy(self.images[places])


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One split, read from its shards over and over."""

    data_uri: str
    manifest: shards.Manifest
    split: str
    loaders: int = 1
    """Processes that read ahead for each rank; 0 reads in the rank's own."""
    skip_bad: bool = False
    """Leave out samples that are not what the manifest says, instead of stopping."""

    def batches(
        self, config: Config, step: int, rank: int, world_size: int
    ) -> Iterator[UInt8[Tensor, "n c h w"]]:
        """Yield a rank's slice of one global batch after the other, for ever.

        The batches are the same for any number of ranks and loaders, and begin at any step without
        reading what came before it. Each rank holds two shards per lane of its own in memory.

        Raises:
            UserError: fewer lanes of shards than ranks, or a shard that is not the manifest's.
        """
        lanes = self.check(config, world_size)
        share = lanes // world_size
        mine = range(rank * share, (rank + 1) * share)
        reader: Iterable[Tensor | str] = _Lanes(self, config, step, mine, lanes)
        parts = 1
        if self.loaders:
            parts = math.gcd(share, self.loaders)
            # Not forked: a rank has threads of Ray and gloo, whose locks a fork would copy.
            reader = DataLoader(
                reader,
                batch_size=None,
                num_workers=parts,
                prefetch_factor=4,
                multiprocessing_context="forkserver",
            )
        # A loader takes from its processes in turn, so each round is one batch, in order.
        pieces = iter(reader)
        while True:
            batch = []
            for piece in itertools.islice(pieces, parts):
                if isinstance(piece, str):
                    raise UserError(piece)
                batch.append(piece)
            yield torch.cat(batch)

    def check(self, config: Config, world_size: int) -> int:
        """Return the number of lanes of a global batch.

        Raises:
            UserError: it cannot be cut into the ranks.
        """
        found = len(self.manifest.of_split(self.split))
        lanes = order.num_lanes(found, config.batch_size)
        if lanes % world_size:
            raise UserError(
                f"{self.data_uri} has {found} shards of {self.split}, which with batch_size "
                f"{config.batch_size} can be streamed by 1 to {lanes} workers, a power of two, not "
                f"by {world_size}: build it with a smaller --shard-size, or leave --stream out."
            )
        return lanes


class _Lanes(IterableDataset):
    """Some of the lanes of a stream, as a loader's process reads them."""

    def __init__(self, stream: Stream, config: Config, step: int, mine: range, lanes: int) -> None:
        self.stream, self.seed, self.mine, self.lanes = stream, config.seed, mine, lanes
        self.width = config.batch_size // lanes
        self.skip = step * self.width
        self.shards = stream.manifest.of_split(stream.split)

    def __iter__(self) -> Iterator[UInt8[Tensor, "n c h w"] | str]:
        """Yield this process's part of one batch after the other, or last what is wrong.

        An error raised in a loader's process would reach the rank as the text of its traceback.
        """
        info = get_worker_info()
        part, parts = (0, 1) if info is None else (info.id, info.num_workers)
        share = len(self.mine) // parts
        with ThreadPoolExecutor(2) as pool:
            lanes = [self._images(lane, pool) for lane in self.mine[part * share :][:share]]
            try:
                while True:
                    images = [one for lane in lanes for one in itertools.islice(lane, self.width)]
                    yield torch.from_numpy(np.stack(images))
            except UserError as error:
                yield str(error)

    def _images(self, lane: int, pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """Yield the images of a lane, reading a shard ahead."""
        sizes = [shard.samples for shard in self.shards]
        pieces = order.lane_pieces(self.seed, sizes, lane, self.lanes, self.skip)
        coming = pool.submit(self._read, next(pieces))
        empty = 0
        while True:
            images, coming = coming.result(), pool.submit(self._read, next(pieces))
            yield from images
            empty = 0 if images else empty + 1
            if empty > len(sizes):
                raise UserError(f"No sample of {self.stream.data_uri} can be read: build it again.")

    def _read(self, piece: order.Piece) -> list[np.ndarray]:
        """Return a piece's images, views of the shard's bytes; bad ones may be left out."""
        stream = self.stream
        samples = read_shard(
            stream.data_uri,
            self.shards[piece.shard],
            stream.manifest.image_shape,
            skip_bad=stream.skip_bad,
        )
        return [samples[place].image for place in piece.samples if place < len(samples)]


def load_split(
    data_uri: str,
    split: str,
    cache_dir: str | Path,
    *,
    skip_bad: bool = False,
    limit: int = CACHE_LIMIT,
) -> Split:
    """Return one split of the data set at the URI, decoding it if this node has not yet.

    Args:
        data_uri: what ``data_prep/build.py`` wrote.
        split: ``train``, ``valid`` or ``test``.
        cache_dir: a folder of this node. One process fills it while the others wait.
        skip_bad: leave out, and log, samples that are not what the manifest says.
        limit: bytes that all cached data sets may take; the least recently used go first.

    Raises:
        UserError: no such data set or split, a shard that is not the manifest's, or no room.
    """
    manifest = read_split_manifest(data_uri, split)
    root = Path(cache_dir).absolute()
    root.mkdir(parents=True, exist_ok=True)
    of_set = root / manifest.hash
    with lock(root / f"{manifest.hash}.lock"):
        of_set.mkdir(exist_ok=True)
        # A folder appears by one renaming: where it is, it is whole.
        folder = of_set / split
        if not folder.is_dir() and skip_bad:
            folder = of_set / f"{split}-without-bad"
        if not folder.is_dir():
            bytes_needed = manifest.splits[split] * math.prod(manifest.image_shape)
            _make_room(root, manifest.hash, bytes_needed, limit)
            _decode_split(data_uri, manifest, split, folder, skip_bad)
        os.utime(of_set)
        return Split(
            images=np.load(folder / "images.npy", mmap_mode="r"),
            labels=np.load(folder / "labels.npy"),
            keys=np.load(folder / "keys.npy", mmap_mode="r"),
            dataset_hash=manifest.hash,
        )


def read_split_manifest(data_uri: str, split: str) -> shards.Manifest:
    """Return the manifest of a data set that has the split.

    Raises:
        UserError: no such data set or split.
    """
    manifest = shards.read_manifest(data_uri)
    if not manifest.splits.get(split):
        known = ", ".join(name for name, count in manifest.splits.items() if count)
        raise UserError(f"The data set at {data_uri} has no split {split!r}; it has {known}.")
    return manifest


def batches(
    config: Config,
    source: Split | Stream | None,
    step: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, order.Draws]]:
    """Yield a rank's samples, floats in [0, 1] or points, and draws of one step after the other.

    They are prepared in the background, some steps ahead, where there is something to wait for.

    Args:
        config: says batch size, seed and data set.
        source: the samples; None for ``ring`` and ``grid``, which are drawn afresh.
        step: the first step.
        rank: of this process.
        world_size: number of ranks.
        device: where the tensors go. The copies do not wait for the device.
    """
    pin = device.type == "cuda"

    def prepared() -> Iterator[tuple[Tensor, order.Draws]]:
        streamed = (
            source.batches(config, step, rank, world_size) if isinstance(source, Stream) else None
        )
        for now in itertools.count(step):
            draws = order.draw(config, now, rank, world_size)
            if streamed is not None:
                x = next(streamed)
            elif isinstance(source, Split):
                x = source.batch(config, now, rank, world_size)
            else:
                x = order.points(config, now, rank, world_size)
            if pin:
                x, draws = x.pin_memory(), order.Draws(*(part.pin_memory() for part in draws))
            yield x, draws

    # Points on a CPU wait for nothing; another thread would take the interpreter from the step.
    at_once = source is None and device.type == "cpu"
    for x, draws in prepared() if at_once else _ahead(prepared(), _BATCHES_AHEAD):
        x = x.to(device, non_blocking=True)
        yield (x if source is None else to_float(x)), draws.to(device)


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield endless items that another thread makes, so many ahead."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, items) for _ in range(count))
        while True:
            item = waiting.popleft().result()
            waiting.append(pool.submit(next, items))
            yield item


def _make_room(root: Path, keep: str, needed: int, limit: int) -> None:
    """Delete the least recently used data sets of a cache until there is room for one more.

    Raises:
        UserError: there is none, whatever is deleted.
    """
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
        with lock(root / f"{oldest.name}.lock", wait=False) as free_to_go:
            if free_to_go:  # whoever has its arrays open keeps them
                log.info("deleting %s from the cache to make room", oldest)
                shutil.rmtree(oldest)
                del sizes[oldest]


def _decode_split(
    data_uri: str, manifest: shards.Manifest, split: str, folder: Path, skip_bad: bool
) -> None:
    """Write ``images.npy``, ``labels.npy`` and ``keys.npy`` of one split into the folder."""
    of_split = manifest.of_split(split)
    total = sum(shard.samples for shard in of_split)
    log.info("decoding %d images of %s/%s", total, data_uri, split)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    images = _new_array(partial / "images.npy", (total, *manifest.image_shape))
    starts = np.cumsum([0] + [shard.samples for shard in of_split])

    def decode(number: int) -> tuple[list[str], list[object]]:
        keys, labels = [], []
        shard = of_split[number]
        samples = read_shard(data_uri, shard, manifest.image_shape, skip_bad=skip_bad)
        for place, sample in enumerate(samples, start=starts[number]):
            images[place] = sample.image
            keys.append(sample.key)
            labels.append(_label(sample, shard.key))
        return keys, labels

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(decode, range(len(of_split))))
    images.flush()
    counts = [len(keys) for keys, _ in found]
    if sum(counts) < total:
        _close_gaps(partial, images, starts, counts)
    labels = np.array([label for _, part in found for label in part], dtype=np.int64)
    np.save(partial / "labels.npy", labels)
    np.save(partial / "keys.npy", np.array([key for part, _ in found for key in part]))
    partial.rename(folder)


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Return a new memory-mapped file of bytes, whose room on the disk is taken at once.

    Raises:
        UserError: there is no such room. Found out later, it would be a signal that kills.
    """
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


def _close_gaps(
    partial: Path, images: np.memmap, starts: np.ndarray, counts: Sequence[int]
) -> None:
    """Write ``images.npy`` again without the rows that were left out at each shard's end."""
    if not sum(counts):
        raise UserError("No sample of the split can be read: build the data set again.")
    closed = _new_array(partial / "closed.npy", (sum(counts), *images.shape[1:]))
    ends = np.cumsum(counts)
    for start, count, end in zip(starts, counts, ends, strict=False):
        closed[end - count : end] = images[start : start + count]
    closed.flush()
    (partial / "closed.npy").replace(partial / "images.npy")


def read_shard(
    data_uri: str,
    shard: shards.Shard,
    image_shape: tuple[int, int, int],
    *,
    skip_bad: bool = False,
) -> list[shards.Sample]:
    """Return a shard's samples after checking it against the manifest.

    Args:
        data_uri: the data set.
        shard: its entry of the manifest.
        image_shape: what every image must have.
        skip_bad: return the samples that are what was written, and log how many were left out.

    Raises:
        UserError: a wrong digest, count or image shape; the sentence names the shard, and what in
            it is wrong.
    """
    uri = storage.join(data_uri, shard.key)
    raw = b""
    try:
        raw = storage.patiently(storage.read_bytes, uri)
        return _checked(uri, raw, shard, image_shape)
    except storage.Unavailable:
        raise
    except UserError as error:
        if not skip_bad:
            raise
        good, _ = shards.salvage_tar(raw)
        good = [sample for sample in good if sample.image.shape == image_shape]
        log.warning(
            "%s: %d of %d samples left out. %s",
            uri,
            shard.samples - len(good),
            shard.samples,
            error,
        )
        return good[: shard.samples]


def _checked(
    uri: str, raw: bytes, shard: shards.Shard, image_shape: tuple[int, int, int]
) -> list[shards.Sample]:
    """Return the samples of a shard's bytes if they are what the manifest says."""
    mend = "build the data set again, or run data_prep/verify.py to see all that is wrong"
    if sha256(raw).hexdigest() != shard.sha256:
        _, wrong = shards.salvage_tar(raw)
        told = f"; wrong in it: {wrong[0]}" if wrong else ""
        raise UserError(
            f"The shard {uri} is not the one of the manifest (wrong sha256{told}): {mend}."
        )
    try:
        samples = list(shards.read_tar(raw))
    except UserError as error:
        raise UserError(f"The shard {uri} cannot be read ({error}): {mend}.") from error
    if len(samples) != shard.samples:
        raise UserError(
            f"The shard {uri} holds {len(samples)} samples, the manifest says {shard.samples}: "
            f"{mend}."
        )
    for sample in samples:
        if sample.image.shape != image_shape:
            raise UserError(
                f"The image {sample.key} of the shard {uri} has shape {sample.image.shape}, the "
                f"manifest says {image_shape}: {mend}."
            )
    return samples


def first_images(source: Split | Stream, count: int) -> UInt8[np.ndarray, "n c h w"]:
    """Return the first images of the first shard, for pictures that show the same ones."""
    if isinstance(source, Split):
        return source.images[:count]
    manifest = source.manifest
    first = manifest.of_split(source.split)[0]
    samples = read_shard(source.data_uri, first, manifest.image_shape, skip_bad=source.skip_bad)
    return np.stack([sample.image for sample in samples[:count]])


def _label(sample: shards.Sample, shard: str) -> object:
    if "label" in sample.meta:
        return sample.meta["label"]
    if "attributes" in sample.meta:
        return sample.meta["attributes"]
    raise UserError(f"The sample {sample.key} of {shard} has neither a label nor attributes.")


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that ends with the process, however it ends; yield whether it is held."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
