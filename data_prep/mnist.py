"""MNIST, or any other data set in its layout: four IDX files, gzipped or not.

Images of 28 x 28 are padded with zeros to 32 x 32, not resized: the networks halve five times, and
the margin leaves room for shifts. The official test file is ``test``; of the official training
file the last twelfth (5,000 of 60,000) is ``valid`` and what comes before it ``train``.
"""

import functools
import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data_prep.source import Source
from ivegan import storage
from ivegan.errors import UserError
from ivegan.shards import Sample

OPTIONS = frozenset[str]()
SIDE = 32
VALID_SHARE = 12
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_UNSIGNED_BYTES = 0x08


class _Half(NamedTuple):
    """The official training or test half."""

    images: np.ndarray  # (n, height, width)
    labels: np.ndarray  # (n,)
    sources: dict[str, str]


def describe(source: str | None, name: str) -> Source:
    """Return what there is to build.

    Raises:
        UserError: a file is missing, truncated, or not the IDX file that its name promises.
    """
    if source is None:
        raise UserError(f"{name} needs --source: the folder or s3:// URI of the four IDX files.")
    train, test = _half(source, "train"), _half(source, "test")
    if not len(train.images) or not len(test.images):
        raise UserError(f"{source} holds an IDX file without images: nothing to build.")
    valid = len(train.images) // VALID_SHARE
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return Source(
        dataset=name,
        image_shape=(1, SIDE, SIDE),
        splits={
            "train": len(train.images) - valid,
            "valid": valid,
            "test": len(test.images),
        },
        sources=train.sources | test.sources,
        settings={
            "image": f"zero padded to {SIDE}x{SIDE}",
            "split": f"valid is the last 1/{VALID_SHARE} of the training file",
        },
        label_names=tuple(str(label) for label in range(classes)),
    )


def read(source: str, split: str, start: int, stop: int) -> Iterator[Sample]:
    """Yield the samples of one split from start to stop."""
    half = _half(source, "test" if split == "test" else "train")
    first = len(half.images) - len(half.images) // VALID_SHARE if split == "valid" else 0
    (file, _) = half.sources
    for place in range(first + start, first + stop):
        image = half.images[place]
        spare = [SIDE - side for side in image.shape]
        padded = np.pad(image, [(room // 2, room - room // 2) for room in spare])
        meta = {"label": int(half.labels[place]), "source": f"{file}#{place}"}
        yield Sample(f"{split}-{place - first:06d}", padded[None], meta)


@functools.lru_cache(maxsize=2)
def _half(source: str, half: str) -> _Half:
    """Return the images and labels of one half, and the files they came from."""
    images_file, labels_file = FILES[half]
    images, images_source = _read_idx(source, images_file, num_axes=3)
    labels, labels_source = _read_idx(source, labels_file, num_axes=1)
    if len(images) != len(labels):
        raise UserError(
            f"{images_file} holds {len(images)} images, but {labels_file} {len(labels)} labels: "
            "download both again."
        )
    if max(images.shape[1:]) > SIDE:
        raise UserError(f"The images of {images_file} are larger than {SIDE} x {SIDE} pixels.")
    return _Half(images, labels, images_source | labels_source)


def _read_idx(source: str, name: str, num_axes: int) -> tuple[np.ndarray, dict[str, str]]:
    """Return an IDX file's array, and its file name with its sha256."""
    for candidate in (f"{name}.gz", name):
        uri = storage.join(source, candidate)
        if storage.exists(uri):
            break
    else:
        raise UserError(f"There is no {name}.gz or {name} in {source}: correct --source.")
    raw = storage.read_bytes(uri)
    try:
        data = gzip.decompress(raw) if candidate.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{uri} is damaged ({error}): download it again.") from error
    # Two zero bytes, the type of the values, the number of axes; then each axis's length.
    header = 4 + 4 * num_axes
    if len(data) < header or data[:4] != bytes([0, 0, _UNSIGNED_BYTES, num_axes]):
        raise UserError(
            f"{uri} is no IDX file of {num_axes} axes: it starts with 0x{data[:4].hex()} instead "
            f"of 0x{bytes([0, 0, _UNSIGNED_BYTES, num_axes]).hex()}."
        )
    shape = struct.unpack(f">{num_axes}I", data[4:header])
    if len(data) - header != math.prod(shape):
        raise UserError(
            f"{uri} is truncated or too long: it holds {len(data) - header} values instead of "
            f"{math.prod(shape)}; download it again."
        )
    array = np.frombuffer(data, np.uint8, offset=header).reshape(shape)
    return array, {candidate: hashlib.sha256(raw).hexdigest()}
