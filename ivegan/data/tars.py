"""Samples as tars: byte-reproducible to write, readable by webdataset, checked when read.

Images are stored as .npy files without compression: docs/data.md compares the encodings.
"""

import io
import logging
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ivegan import storage
from ivegan.data.manifest import Shard
from ivegan.errors import UserError
from ivegan.shapes import UInt8
from ivegan.storage.digest import canonical_json, sha256_hex
from ivegan.storage.schema import DamagedError, parse_json

log = logging.getLogger(__name__)

_END = bytes(2 * tarfile.BLOCKSIZE)
_REMEDY = "delete it and build the data set again, or run data_prep/verify.py to list all errors"


class Sample(NamedTuple):
    """One image and its metadata."""

    key: str
    """Unique in the data set; names the entries of the tar."""
    image: UInt8[np.ndarray, "c h w"]
    """0 to 255; one channel for grey, three for red, green, blue."""
    meta: dict[str, Any]
    """``label`` (int) or ``attributes`` (list of 0 and 1); ``source``, the id in the raw data."""


@dataclass(frozen=True)
class Row:
    """Location of a sample in a tar, and its metadata."""

    key: str
    meta: dict[str, Any]
    offset: int
    """Of the image's .npy file, from the start of the tar."""
    bytes: int


def write_tar(samples: Iterable[Sample]) -> tuple[bytes, list[Row]]:
    """Return a tar, the same bytes for the same samples, and the locations of the samples."""
    file, rows = io.BytesIO(), []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for sample in samples:
            image = encode(sample.image)
            rows.append(Row(sample.key, sample.meta, file.tell() + tarfile.BLOCKSIZE, len(image)))
            _add(archive, f"{sample.key}.npy", image)
            _add(archive, f"{sample.key}.json", _json_with_crc32(image, sample.meta))
        size = file.tell() + len(_END)
    file.truncate(size)  # close() pads to a record of 10,240 bytes
    return file.getvalue(), rows


def read_tar(data: bytes) -> Iterator[Sample]:
    """Yield the samples of a tar in their order; their images are views of the tar's bytes.

    The samples' checksums are not compared: the manifest holds the tar's sha256.

    Raises:
        DamagedError: the tar is damaged, or holds other files.
    """
    for key, image, meta in _pairs(data):
        yield _sample(key, image, meta)


def salvage_tar(data: bytes) -> tuple[list[Sample], list[str]]:
    """Return the samples of a damaged tar whose checksums are right, and a list of errors.

    The errors are keys of damaged samples, and a sentence if the tar cannot be read to its end.
    """
    good, errors = [], []
    try:
        for key, image, raw_meta in _pairs(data):
            try:
                sample = _sample(key, image, raw_meta)
                if raw_meta != _json_with_crc32(image, sample.meta):
                    raise DamagedError(f"The checksum of {key} is wrong.")
                good.append(sample)
            except UserError:
                errors.append(key)
    except UserError as error:
        errors.append(str(error))
    return good, errors


def read_shard(
    data_uri: str, shard: Shard, image_shape: tuple[int, int, int], *, skip_bad: bool = False
) -> list[Sample]:
    """Return a shard's samples after checking it against the manifest.

    With ``skip_bad`` only the samples with a right checksum are returned, none of a missing shard,
    and the others counted in the log.

    Raises:
        UserError: a wrong digest, count or image shape; the sentence names the shard and the key.
    """
    uri = storage.join(data_uri, shard.key)
    raw = b""
    try:
        raw = storage.read_bytes(uri)
        return _check_shard(uri, raw, shard, image_shape)
    except (DamagedError, storage.Missing) as error:
        if not skip_bad:
            raise
        raw = raw or getattr(error, "data", b"")
        good = [sample for sample in salvage_tar(raw)[0] if sample.image.shape == image_shape]
        missing = shard.samples - len(good)
        log.warning("%s: %d of %d samples left out. %s", uri, missing, shard.samples, error)
        return good[: shard.samples]


_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '\|u1', 'fortran_order': False, "
    rb"'shape': \((\d+), (\d+), (\d+)\), \} *\n",
    re.DOTALL,
)


def encode(image: UInt8[np.ndarray, "c h w"]) -> bytes:
    """Return the image as the bytes of an .npy file."""
    file = io.BytesIO()
    np.save(file, image, allow_pickle=False)
    return file.getvalue()


def decode(data: bytes | memoryview) -> UInt8[np.ndarray, "c h w"]:
    """Return the image of an .npy file, as a view of the bytes.

    Raises:
        DamagedError: the bytes are not such an image.
    """
    # Not numpy's own reader: it evaluates the header, for which Python 3.11 is not safe in threads.
    header = _HEADER.match(bytes(data[:256]))
    if header is None or header.end() != 10 + int.from_bytes(header[1], "little"):
        raise DamagedError("An image of the tar is damaged: it is no uint8 (c, h, w) in npy 1.0.")
    shape = tuple(map(int, header.groups()[1:]))
    try:
        return np.frombuffer(data, np.uint8, offset=header.end()).reshape(shape)
    except ValueError as error:
        raise DamagedError(f"An image of the tar is damaged: {error}.") from error


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # without time and owner
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def _check_shard(
    uri: str, raw: bytes, shard: Shard, image_shape: tuple[int, int, int]
) -> list[Sample]:
    """Return the samples of a shard's bytes after checking them against the manifest."""
    if sha256_hex(raw) != shard.sha256:
        errors = salvage_tar(raw)[1]
        first = f"; wrong in it: {errors[0]}" if errors else ""
        raise DamagedError(
            f"The shard {uri} is not the one of the manifest (wrong sha256{first}): {_REMEDY}."
        )
    samples = list(read_tar(raw))
    if len(samples) != shard.samples or any(s.image.shape != image_shape for s in samples):
        raise DamagedError(
            f"The shard {uri} does not hold {shard.samples} images of shape {image_shape}, as the "
            f"manifest says: {_REMEDY}."
        )
    return samples


def _pairs(data: bytes) -> Iterator[tuple[str, memoryview, memoryview]]:
    """Yield each sample's key, image and JSON as they are stored."""
    entries = _entries(data)
    for name, image in entries:
        key, _, suffix = name.rpartition(".")
        other, meta = next(entries, ("its end", memoryview(b"")))
        if suffix != "npy" or other != f"{key}.json":
            raise DamagedError(
                f"The tar holds {name}, then {other}, not the two files of a sample."
            )
        yield key, image, meta


def _entries(data: bytes) -> Iterator[tuple[str, memoryview]]:
    """Yield each entry's name and content."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                content = memoryview(data)[entry.offset_data :][: entry.size]
                if not entry.isreg() or len(content) < entry.size:
                    raise DamagedError(f"The tar is damaged or cut off at {entry.name}.")
                yield entry.name, content
            # tarfile takes any block that is no header for the end.
            if data[archive.offset : archive.offset + len(_END)] != _END:
                raise DamagedError(f"The tar is damaged or cut off at byte {archive.offset}.")
    except tarfile.TarError as error:
        raise DamagedError(f"The tar is damaged or cut off: {error}.") from error


def _sample(key: str, image: memoryview, raw_meta: memoryview) -> Sample:
    """Return a sample from its two files, without comparing its checksum."""
    meta = parse_json(bytes(raw_meta), f"The JSON of {key}", "build the data set again")
    if not isinstance(meta, dict) or "crc32" not in meta:
        raise DamagedError(f"The JSON of {key} is damaged: it has no checksum.")
    del meta["crc32"]
    return Sample(key, decode(image), meta)


def _json_with_crc32(image: bytes | memoryview, meta: dict[str, Any]) -> bytes:
    """Return a sample's JSON with a checksum of image and metadata."""
    text = canonical_json(meta)
    return b'%b,"crc32":%d}' % (text[:-1], zlib.crc32(text, zlib.crc32(image)))
