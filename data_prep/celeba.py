"""CelebA, aligned: JPEGs of 178 x 218 inside ``img_align_celeba.zip``, read in place.

Beside the zip stand ``list_attr_celeba.txt`` and ``list_eval_partition.txt``, and optionally
``identity_CelebA.txt``; the official split is kept. The central 128 x 128 pixels are cut out
(``c128``), as the paper says; ``c178r128`` cuts out 178 x 178 and resizes, as others do whose
Frechet distances one may want to compare with. A subset with shorter lists is taken as it is.
"""

import functools
import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep.source import Source, file_sha256
from ivegan import storage
from ivegan.errors import UserError
from ivegan.shards import SPLITS, Sample

OPTIONS = frozenset({"crop", "limit"})
SIDE = 128
WIDTH, HEIGHT = 178, 218
ZIP = "img_align_celeba.zip"
ATTRIBUTES, PARTITION, IDENTITY = (
    "list_attr_celeba.txt",
    "list_eval_partition.txt",
    "identity_CelebA.txt",
)
NUM_ATTRIBUTES = 40
CROPS = {"c128": 128, "c178r128": 178}


class _Lists(NamedTuple):
    """The annotations."""

    splits: dict[str, list[str]]  # split -> file names
    attributes: dict[str, str]  # file name -> its row, as written
    attribute_names: tuple[str, ...]
    identities: dict[str, str]
    sources: dict[str, str]


def describe(
    source: str | None, name: str, *, crop: str = "c128", limit: int | None = None
) -> Source:
    """Return what there is to build.

    Raises:
        UserError: a file is missing or damaged, or the lists and the zip do not fit each other.
    """
    if source is None:
        raise UserError(f"{name} needs --source: the folder or s3:// URI that holds {ZIP}.")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}, but must be at least 1.")
    lists = _lists(source)
    names = {split: files[:limit] for split, files in lists.splits.items()}
    uri = storage.join(source, ZIP)
    with storage.open_file(uri) as file, _archive(file, uri) as archive:
        members = _members(archive)
    for file_name in (file_name for files in names.values() for file_name in files):
        if file_name not in members:
            raise UserError(f"{uri} has no image {file_name}, which {PARTITION} lists.")
        if file_name not in lists.attributes:
            raise UserError(f"{ATTRIBUTES} has no row for {file_name}, which {PARTITION} lists.")
    return Source(
        dataset=name,
        image_shape=(3, SIDE, SIDE),
        splits={split: len(files) for split, files in names.items()},
        sources={ZIP: file_sha256(uri), **lists.sources},
        settings={"crop": crop, "limit_per_split": limit, "split": "official"},
        label_names=lists.attribute_names,
    )


def read(
    source: str, split: str, start: int, stop: int, *, crop: str = "c128", limit: int | None = None
) -> Iterator[Sample]:
    """Yield the samples of one split from start to stop."""
    lists = _lists(source)
    uri = storage.join(source, ZIP)
    with storage.open_file(uri) as file, _archive(file, uri) as archive:
        members = _members(archive)
        for name in lists.splits[split][:limit][start:stop]:
            try:
                image = cut(archive.read(members[name]), crop)
            except (zipfile.BadZipFile, UnidentifiedImageError, OSError, ValueError) as error:
                raise UserError(f"The image {name} in {uri} cannot be used: {error}.") from error
            meta = {"attributes": _attributes(lists.attributes[name], name), "source": name}
            if name in lists.identities:
                meta["identity"] = int(lists.identities[name])
            yield Sample(PurePosixPath(name).stem, image, meta)


def cut(jpeg: bytes, crop: str) -> np.ndarray:
    """Return the image's central square as uint8 (3, 128, 128).

    Raises:
        ValueError: the image is not one of the aligned ones.
    """
    with Image.open(io.BytesIO(jpeg)) as file:
        if file.size != (WIDTH, HEIGHT):
            raise ValueError(f"it has {file.size} pixels instead of {(WIDTH, HEIGHT)}")
        side = CROPS[crop]
        left, top = (WIDTH - side) // 2, (HEIGHT - side) // 2
        square = file.convert("RGB").crop((left, top, left + side, top + side))
    if side != SIDE:
        square = square.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


@functools.lru_cache(maxsize=1)
def _lists(source: str) -> _Lists:
    """Return the annotations, which every shard needs and no shard changes."""
    sources: dict[str, str] = {}

    def rows(name: str) -> list[str]:
        uri = storage.join(source, name)
        if not storage.exists(uri):
            raise UserError(f"There is no {name} in {source}: it belongs beside {ZIP}.")
        raw = storage.read_bytes(uri)
        sources[name] = hashlib.sha256(raw).hexdigest()
        try:
            return raw.decode("ascii").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{uri} is no text file: {error}.") from error

    header = rows(ATTRIBUTES)
    where = storage.join(source, ATTRIBUTES)
    if len(header) < 2 or not header[0].strip().isdigit():
        raise UserError(f"{where} does not start with the number of its rows.")
    if int(header[0]) != len(header) - 2:
        raise UserError(f"{where} says {header[0]} rows, but has {len(header) - 2}.")
    attribute_names = tuple(header[1].split())
    if len(attribute_names) != NUM_ATTRIBUTES:
        raise UserError(
            f"{where} names {len(attribute_names)} attributes instead of {NUM_ATTRIBUTES}."
        )
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for row in rows(PARTITION):
        name, _, part = row.partition(" ")
        if part.strip() not in ("0", "1", "2"):
            raise UserError(
                f"{storage.join(source, PARTITION)} says {row!r}, where a file name and 0, 1 or 2 "
                "is expected."
            )
        splits[SPLITS[int(part)]].append(name)
    has_identities = storage.exists(storage.join(source, IDENTITY))
    return _Lists(
        splits=splits,
        attributes={row.partition(" ")[0]: row for row in header[2:]},
        attribute_names=attribute_names,
        identities=dict(row.split() for row in rows(IDENTITY)) if has_identities else {},
        sources=sources,
    )


def _attributes(row: str, name: str) -> list[int]:
    """Return a row's -1 and 1 as 0 and 1."""
    values = row.split()[1:]
    if len(values) != NUM_ATTRIBUTES or not set(values) <= {"-1", "1"}:
        raise UserError(
            f"The row of {name} in {ATTRIBUTES} has not {NUM_ATTRIBUTES} values -1 or 1."
        )
    return [int(value == "1") for value in values]


def _archive(file: io.BufferedReader, uri: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise UserError(f"{uri} is damaged ({error}): download it again.") from error


def _members(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return file name -> name in the archive, whose folder differs between releases."""
    paths = map(PurePosixPath, archive.namelist())
    return {path.name: str(path) for path in paths if path.suffix == ".jpg"}
