"""The data set on disk: tars of samples and the manifest that says what is in them.

    OUT/train/shard-00000.tar …    entries KEY.png and KEY.json (label or attributes, source)
    OUT/manifest.json              written last: without it there is no data set

PNG at its fastest setting was chosen by measurement (128 x 128 faces: 28 KB, 1.6 ms to write,
against 27 KB and 4.1 ms at the default; lossless WebP takes 20 KB and 1.0 ms, but fewer readers of
such tars know it). Each image is decoded once per node, so size matters more than decoding.

Tars are byte-reproducible and readable by webdataset. This module knows bytes and names; where
they come from is ``data_prep``'s, who reads them in which order is ``data``'s and ``order``'s.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ivegan import storage
from ivegan.errors import UserError
from ivegan.shapes import UInt8

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
ENCODING = {"format": "png", "compress_level": 1}
SPLITS = ("train", "valid", "test")


class Sample(NamedTuple):
    """One image and what is known of it."""

    key: str
    """Unique in the data set; names the entries of the tar."""
    image: UInt8[np.ndarray, "c h w"]
    """0 to 255; one channel for grey, three for red, green, blue."""
    meta: dict[str, Any]
    """``label`` (int) or ``attributes`` (list of 0 and 1); ``source``, the id in the raw data."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar as the manifest describes it."""

    split: str
    key: str
    """Name below the data set's folder, ``train/shard-00000.tar``."""
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a data set is, down to each shard's digest."""

    dataset: str
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    splits: dict[str, int]
    """Samples per split."""
    shards: tuple[Shard, ...]
    """Split by split, in the order of their numbers."""
    sources: dict[str, str]
    """Raw files: name -> sha256."""
    settings: dict[str, Any]
    """All that was chosen in preparing the data."""
    settings_hash: str
    label_names: tuple[str, ...] = ()
    """Classes by label, or attributes by column."""
    schema_version: int = SCHEMA_VERSION

    @property
    def hash(self) -> str:
        """Return the sha256 of the manifest file: the data set's identity."""
        return hashlib.sha256(to_json(self)).hexdigest()

    def of_split(self, split: str) -> list[Shard]:
        """Return the shards of one split."""
        return [shard for shard in self.shards if shard.split == split]


def shard_key(split: str, number: int) -> str:
    """Return a shard's name below the data set's folder."""
    return f"{split}/shard-{number:05d}.tar"


def settings_hash(settings: dict[str, Any]) -> str:
    """Return the sha256 of the settings' canonical JSON."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def to_json(manifest: Manifest) -> bytes:
    """Return the one text that a manifest has."""
    return (json.dumps(dataclasses.asdict(manifest), sort_keys=True, indent=1) + "\n").encode()


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Write the manifest of the data set at the URI, which makes it one."""
    storage.write_bytes(storage.join(uri, MANIFEST), to_json(manifest))


def read_manifest(uri: str) -> Manifest:
    """Return the manifest of the data set at the URI.

    Raises:
        UserError: there is none, it is of another version, or it is damaged.
    """
    where = storage.join(uri, MANIFEST)
    if not storage.exists(where):
        raise UserError(f"There is no data set at {uri}: build it with data_prep/build.py.")
    try:
        values = json.loads(storage.read_bytes(where))
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{where} has schema version {version}, but this program reads version "
                f"{SCHEMA_VERSION}: build the data set again."
            )
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        channels, height, width = values.pop("image_shape")
        names = tuple(values.pop("label_names"))
        manifest = Manifest(
            **values, shards=shards, image_shape=(channels, height, width), label_names=names
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged ({error}): build the data set again.") from error
    if not manifest.shards or not any(manifest.splits.values()):
        raise UserError(f"The data set at {uri} is empty: build it from a source with images.")
    return manifest


def write_tar(samples: Iterable[Sample]) -> bytes:
    """Return the samples as a tar whose bytes depend on nothing but them."""
    from webdataset.writer import TarWriter

    into = io.BytesIO()
    with TarWriter(into, encoder=False, mtime=0, user="ivegan", group="ivegan") as tar:
        for sample in samples:
            meta = json.dumps(sample.meta, sort_keys=True).encode()
            tar.write({"__key__": sample.key, "png": encode(sample.image), "json": meta})
    return into.getvalue()


def read_tar(data: bytes) -> Iterator[Sample]:
    """Yield the samples of a tar in their order.

    Raises:
        UserError: the tar is damaged, or holds something else.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            image, meta = None, None
            for entry in tar:
                key, _, kind = entry.name.rpartition(".")
                file = tar.extractfile(entry)
                if file is None:
                    raise UserError(f"The tar holds {entry.name}, which is no file.")
                content = file.read()
                if kind == "json":
                    meta = (key, json.loads(content))
                elif kind == "png":
                    image = (key, decode(content))
                else:
                    raise UserError(f"The tar holds {entry.name}, which is no part of a sample.")
                if image is None or meta is None:
                    continue
                if image[0] != meta[0]:
                    raise UserError(f"The tar holds {image[0]} without its other half.")
                yield Sample(key, image[1], meta[1])
                image, meta = None, None
            if image is not None or meta is not None:
                raise UserError("The tar ends in the middle of a sample.")
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"The tar is damaged: {error}.") from error


def encode(image: UInt8[np.ndarray, "c h w"]) -> bytes:
    """Return the image as PNG, which loses nothing."""
    into = io.BytesIO()
    pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(pixels)).save(into, **ENCODING)
    return into.getvalue()


def decode(data: bytes) -> UInt8[np.ndarray, "c h w"]:
    """Return the image, exactly as it was encoded."""
    with Image.open(io.BytesIO(data)) as file:
        pixels = np.asarray(file)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
