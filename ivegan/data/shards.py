"""The data set on disk: tars of samples and the manifest that says what is in them.

    OUT/train/shard-00000.tar …    entries KEY.npy (image, c h w) and KEY.json (label or attributes)
    OUT/samples.parquet            a row per sample: key, split, labels, source, shard, offset
    OUT/contact-train.png …        some images of each split, to look at
    OUT/manifest.json              written last: without it there is no data set

Images are stored as they are, uint8, without compression. That was chosen by measurement, on one
core and 600 faces of 128 x 128, beside the .30 ms that decoding and cropping the source JPEG takes:

    encoding            bytes     write       read    largest mean squared error
    npy, raw           49,280    .01 ms     .01 ms    0
    PNG, level 1       27,952   1.25 ms     .54 ms    0
    WebP, lossless     19,915    .63 ms     .36 ms    0
    zstd of a delta    30,950    .24 ms     .18 ms    0
    JPEG, quality 98   12,542    .14 ms     .20 ms    1.7
    JPEG, quality 95    9,110    .13 ms     .18 ms    5.3

Raw is what a stream can be read in at many times the rate of JPEGs, it loses nothing, and its bytes
depend on no codec's version. It costs 10 GB for the 202,599 faces where PNG would take 5.7 GB.

Tars are byte-reproducible and readable by webdataset. This module knows bytes and names; where
they come from is ``data_prep``'s, who reads them in which order is ``data``'s and ``order``'s.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ivegan import storage
from ivegan.errors import UserError
from ivegan.shapes import UInt8

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
ENCODING = {"format": "npy", "dtype": "uint8"}
SPLITS = ("train", "valid", "test")


class Sample(NamedTuple):
    """One image and what is known of it."""

    key: str
    """Unique in the data set; names the entries of the tar."""
    image: UInt8[np.ndarray, "c h w"]
    """0 to 255; one channel for grey, three for red, green, blue."""
    meta: dict[str, Any]
    """``label`` (int) or ``attributes`` (list of 0 and 1); ``source``, the id in the raw data."""


class Row(NamedTuple):
    """Where a tar holds a sample, and what is known of it."""

    key: str
    meta: dict[str, Any]
    offset: int
    """Of the image's .npy file, from the start of the tar."""
    bytes: int


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
    extras: dict[str, str] = field(default_factory=dict)
    """Other files of the data set, for people: name -> sha256."""
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


def tar_parts(samples: Iterable[Sample], rows: list[Row]) -> Iterator[bytes]:
    """Yield a tar piece by piece, the same bytes for the same samples.

    Args:
        samples: what to write, taken one by one.
        rows: where the tar holds each sample is added here.
    """
    place = 0
    for sample in samples:
        image = encode(sample.image)
        entry = _tar_entry(f"{sample.key}.npy", image)
        rows.append(Row(sample.key, sample.meta, place + tarfile.BLOCKSIZE, len(image)))
        part = entry + _tar_entry(f"{sample.key}.json", _with_crc32(image, sample.meta))
        place += len(part)
        yield part
    yield bytes(2 * tarfile.BLOCKSIZE)


def read_tar(data: bytes) -> Iterator[Sample]:
    """Yield the samples of a tar in their order; their images are views of the tar's bytes.

    The check sums of samples are not looked at: whoever knows the tar's sha256 has no need to.

    Raises:
        UserError: the tar is damaged, or holds something else.
    """
    for key, image, meta in _pairs(data):
        yield Sample(key, decode(image), _read_meta(key, meta))


def salvage_tar(data: bytes) -> tuple[list[Sample], list[str]]:
    """Return the samples of a damaged tar that are what was written, and what is wrong with it.

    Each sample is believed only if its own check sum says so. What is wrong are the keys of others,
    and a sentence where the tar could not be read to its end.
    """
    good, wrong = [], []
    try:
        for key, image, meta in _pairs(data):
            try:
                known = _read_meta(key, meta)
                if meta != _with_crc32(image, known):
                    raise UserError("It is not what was written.")
                good.append(Sample(key, decode(image), known))
            except UserError:
                wrong.append(key)
    except UserError as error:
        wrong.append(str(error))
    return good, wrong


def encode(image: UInt8[np.ndarray, "c h w"]) -> bytes:
    """Return the image as the bytes of an .npy file."""
    return _npy_header(image.shape) + image.tobytes()


def decode(data: bytes | memoryview) -> UInt8[np.ndarray, "c h w"]:
    """Return the image, exactly as it was encoded, as a view of the bytes.

    Raises:
        UserError: this is no image of ours.
    """
    length = 10 + int.from_bytes(data[8:10], "little")
    try:
        shape = _npy_shape(bytes(data[:length]))
        return np.frombuffer(data, np.uint8, offset=length).reshape(shape)
    except ValueError as error:
        raise UserError(f"An image of the tar is damaged: {error}.") from error


def _tar_entry(name: str, content: bytes) -> bytes:
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    return b"%b%b%b" % (_tar_header(name, len(content)), content, padding)


def _tar_header(name: str, size: int) -> bytes:
    """Return an entry's header as tarfile writes it, in a fifth of the time it takes for that.

    Raises:
        ValueError: the name is too long, or not ASCII.
    """
    raw, (blank, total) = name.encode("ascii"), _blank_tar_header(size)
    if len(raw) > 99:
        raise ValueError(f"the name {name} is too long for an entry of a tar")
    return b"%b%b%06o\0%b" % (raw, blank[len(raw) : 148], total + sum(raw), blank[155:])


@functools.lru_cache(maxsize=1024)
def _blank_tar_header(size: int) -> tuple[bytes, int]:
    """Return the header of an entry without its name, blanks for its check sum, and their sum."""
    entry = tarfile.TarInfo()  # its time is 0 and its owner nobody, whoever writes it
    entry.size = size
    header = entry.tobuf(tarfile.USTAR_FORMAT)
    header = header[:148] + b" " * 8 + header[156:]
    return header, sum(header)


@functools.lru_cache(maxsize=8)
def _npy_header(shape: tuple[int, ...]) -> bytes:
    """Return what stands before the pixels."""
    into = io.BytesIO()
    np.lib.format.write_array(into, np.empty(shape, np.uint8), (1, 0), allow_pickle=False)
    return into.getvalue()[: -math.prod(shape)]


@functools.lru_cache(maxsize=8)
def _npy_shape(header: bytes) -> tuple[int, ...]:
    """Return the shape in the header of an .npy file; parsed once, for it is always the same.

    Raises:
        ValueError: this is no header, or not that of an image.
    """
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("its .npy header is of another version than 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype != np.uint8 or fortran_order or len(shape) != 3:
        raise ValueError(f"it holds {dtype} {shape} where uint8 (c, h, w) is expected")
    return shape


def _pairs(data: bytes) -> Iterator[tuple[str, memoryview, memoryview]]:
    """Yield each sample's key, image and JSON, both as written.

    Raises:
        UserError: the tar is damaged, or holds something else.
    """
    waiting: tuple[str, memoryview] | None = None
    for name, content in _entries(data):
        key, _, kind = name.rpartition(".")
        if kind == "npy" and waiting is None:
            waiting = (key, content)
        elif kind == "json" and waiting is not None and waiting[0] == key:
            yield key, waiting[1], content
            waiting = None
        elif kind in ("npy", "json"):
            raise UserError(f"The tar holds {key} without its other half.")
        else:
            raise UserError(f"The tar holds {name}, which is no part of a sample.")
    if waiting is not None:
        raise UserError("The tar ends in the middle of a sample.")


def _entries(data: bytes) -> Iterator[tuple[str, memoryview]]:
    """Yield each entry's name and content, in a quarter of the time that tarfile takes.

    Raises:
        UserError: a header is not the one that ``tar_parts`` writes, or the end is missing.
    """
    whole, place = memoryview(data), 0
    while (header := data[place : place + tarfile.BLOCKSIZE]).strip(b"\0"):
        name = header[:100].rstrip(b"\0").decode("ascii", errors="replace")
        try:
            size = int(header[124:135], 8)
            known = _tar_header(name, size)
        except ValueError as error:
            raise UserError(f"The tar is damaged at byte {place}.") from error
        if header != known:
            raise UserError(f"The tar is damaged at byte {place}.")
        place += tarfile.BLOCKSIZE
        content = whole[place : place + size]
        if len(content) != size:
            raise UserError(f"The tar ends in the middle of {name}.")
        yield name, content
        place += size + -size % tarfile.BLOCKSIZE
    if len(data) < place + 2 * tarfile.BLOCKSIZE:
        raise UserError("The tar is cut off: its end is missing.")


def _read_meta(key: str, content: memoryview) -> dict[str, Any]:
    """Return what is known of a sample.

    Raises:
        UserError: this is not what ``tar_parts`` writes.
    """
    try:
        meta = json.loads(bytes(content))
        del meta["crc32"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"The JSON of {key} is damaged: {error}.") from error
    return meta


def _with_crc32(image: bytes | memoryview, meta: dict[str, Any]) -> bytes:
    """Return a sample's JSON, with a check sum by which the sample can be believed alone."""
    text = _canonical(meta)
    return b'%b,"crc32":%d}' % (text[:-1], zlib.crc32(text, zlib.crc32(image)))


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
