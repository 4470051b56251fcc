"""Shards to batches: each split is decoded once per node, into arrays that its ranks share.

The arrays are memory-mapped files in a cache folder, keyed by the manifest's hash, so that a data
set built anew is decoded anew. Which sample stands where in a batch is ``order``'s to say.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ivegan import order, shards, storage
from ivegan.config import Config
from ivegan.errors import UserError
from ivegan.shapes import Int, UInt8
from ivegan.transforms import to_float

log = logging.getLogger(__name__)

_MAX_THREADS = 8  # each holds one shard; decoding and digests run outside Python's lock


@dataclass(frozen=True, kw_only=True)
class Split:
    """All samples of one split, in the order of the shards."""

    images: UInt8[np.ndarray, "n c h w"]
    labels: Int[np.ndarray, "n ..."]
    """Class numbers (n,), or one column of 0 and 1 per attribute (n, 40)."""
    keys: Sequence[str] | np.ndarray
    dataset_hash: str
    """Hash of the manifest."""


def load_split(data_uri: str, split: str, cache_dir: str | Path) -> Split:
    """Return one split of the data set at the URI, decoding it if this node has not yet.

    Args:
        data_uri: what ``data_prep/build.py`` wrote.
        split: ``train``, ``valid`` or ``test``.
        cache_dir: a folder of this node. One process fills it while the others wait.

    Raises:
        UserError: no such data set or split, or a shard that is not what the manifest says.
    """
    manifest = shards.read_manifest(data_uri)
    if not manifest.splits.get(split):
        known = ", ".join(name for name, count in manifest.splits.items() if count)
        raise UserError(f"The data set at {data_uri} has no split {split!r}; it has {known}.")
    folder = Path(cache_dir).absolute() / manifest.hash / split
    # A folder appears by one renaming: where it is, it is whole.
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(f"{split}.lock")):
            if not folder.is_dir():
                _decode_split(data_uri, manifest, split, folder)
    return Split(
        images=np.load(folder / "images.npy", mmap_mode="r"),
        labels=np.load(folder / "labels.npy"),
        keys=np.load(folder / "keys.npy", mmap_mode="r"),
        dataset_hash=manifest.hash,
    )


def batches(
    config: Config,
    split: Split | None,
    step: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, order.Draws]]:
    """Yield a rank's samples, floats in [0, 1] or points, and draws of one step after the other.

    Args:
        config: says batch size, seed and data set.
        split: the samples; None for ``ring`` and ``grid``, which are drawn afresh.
        step: the first step.
        rank: of this process.
        world_size: number of ranks.
        device: where the tensors go. The copies do not wait for the device.
    """
    while True:
        draws = order.draw(config, step, rank, world_size)
        if split is None:
            x = order.points(config, step, rank, world_size)
        else:
            total = len(split.images)
            places = order.batch_indices(
                config.seed, total, config.batch_size, step, rank, world_size
            )
            x = torch.from_numpy(split.images[places])
        if device.type == "cuda":
            x, draws = x.pin_memory(), order.Draws(*(part.pin_memory() for part in draws))
        x = x.to(device, non_blocking=True)
        yield (x if split is None else to_float(x)), draws.to(device)
        step += 1


def _decode_split(data_uri: str, manifest: shards.Manifest, split: str, folder: Path) -> None:
    """Write ``images.npy``, ``labels.npy`` and ``keys.npy`` of one split into the folder."""
    of_split = manifest.of_split(split)
    total = sum(shard.samples for shard in of_split)
    log.info("decoding %d images of %s/%s", total, data_uri, split)
    partial = folder.with_name(f"{split}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    images = np.lib.format.open_memmap(
        partial / "images.npy", mode="w+", dtype=np.uint8, shape=(total, *manifest.image_shape)
    )
    starts = np.cumsum([0] + [shard.samples for shard in of_split])

    def decode(number: int) -> tuple[list[str], list[object]]:
        keys, labels = [], []
        samples = read_shard(data_uri, of_split[number], manifest.image_shape)
        for place, sample in enumerate(samples, start=starts[number]):
            images[place] = sample.image
            keys.append(sample.key)
            labels.append(_label(sample, of_split[number].key))
        return keys, labels

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        found = list(pool.map(decode, range(len(of_split))))
    images.flush()
    labels = np.array([label for _, part in found for label in part], dtype=np.int64)
    np.save(partial / "labels.npy", labels)
    np.save(partial / "keys.npy", np.array([key for part, _ in found for key in part]))
    partial.rename(folder)


def read_shard(
    data_uri: str, shard: shards.Shard, image_shape: tuple[int, int, int]
) -> list[shards.Sample]:
    """Return a shard's samples after checking it against the manifest.

    Raises:
        UserError: a wrong digest, count or image shape; the sentence names the shard.
    """
    uri = storage.join(data_uri, shard.key)
    raw = storage.read_bytes(uri)
    mend = "build the data set again, or run data_prep/verify.py to see all that is wrong"
    if sha256(raw).hexdigest() != shard.sha256:
        raise UserError(f"The shard {uri} is not the one of the manifest (wrong sha256): {mend}.")
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


def _label(sample: shards.Sample, shard: str) -> object:
    if "label" in sample.meta:
        return sample.meta["label"]
    if "attributes" in sample.meta:
        return sample.meta["attributes"]
    raise UserError(f"The sample {sample.key} of {shard} has neither a label nor attributes.")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
