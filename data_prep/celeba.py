"""CelebA, aligned: JPEGs of 178 x 218, in ``img_align_celeba.zip`` or in a folder.

The zip is read in place; without one, the JPEGs are looked for in ``img_align_celeba``, then in the
source itself. Beside them stand ``list_attr_celeba.txt`` and ``list_eval_partition.txt``, and
optionally ``identity_CelebA.txt``; the official split is kept. The central 128 x 128 pixels are cut
out (``c128``), as the paper says; ``c178r128`` cuts out 178 x 178 and resizes, as others do whose
Frechet distances one may want to compare with. A subset with shorter lists is taken as it is, but
lists and images must be of one release: the same names, in the lists in the same order.

Lists and zip are read once per process, not per shard: both tell of 202,599 images.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import re
import struct
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep.source import Source, file_sha256
from ivegan import storage
from ivegan.data.manifest import SPLITS
from ivegan.data.tars import Sample
from ivegan.errors import UserError

OPTIONS = frozenset({"crop", "limit"})
SIDE = 128
WIDTH, HEIGHT = 178, 218
ZIP = "img_align_celeba.zip"
FOLDER = "img_align_celeba"
ATTRIBUTES, PARTITION, IDENTITY = (
    "list_attr_celeba.txt",
    "list_eval_partition.txt",
    "identity_CelebA.txt",
)
NUM_ATTRIBUTES = 40
CROPS = {"c128": 128, "c178r128": 178}
_LARGEST = 4 << 20  # bytes of a JPEG; those of the release have less than 20,000
_NAME = re.compile(r"[\w-]+\.jpg", re.ASCII)
_SIGNS = frozenset({"-1", "1"})
# All that zipfile and zlib say of a hostile or damaged file.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    struct.error,
    zlib.error,
)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class _Lists(NamedTuple):
    """The annotations."""

    splits: dict[str, list[str]]  # split -> file names
    attributes: dict[str, bytes]  # file name -> a 0 or 1 for each
    attribute_names: tuple[str, ...]
    identities: dict[str, int]
    sources: dict[str, str]


class _Zip:
    """The images in a zip, which stays open as long as this lives."""

    def __init__(self, uri: str) -> None:
        """Open the zip and look through its directory.

        Raises:
            UserError: it is damaged, or its directory holds what the release's does not.
        """
        self.where = uri
        opened = contextlib.ExitStack()
        weakref.finalize(self, opened.close)
        self._file = opened.enter_context(storage.open_file(uri))
        try:
            self._archive = zipfile.ZipFile(self._file)
        except _BROKEN_ZIP as error:
            raise UserError(f"{uri} is damaged ({error}): download it again.") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._archive.infolist():
            # The images' folder differs between releases, so the last part is what counts.
            parts = member.filename.replace("\\", "/").split("/")
            name = parts[-1]
            if ".." in parts or not parts[0] or ":" in parts[0]:
                raise UserError(
                    f"{uri} holds {member.filename!r}, which leads out of its folder: download it "
                    "from the official place."
                )
            if not _is_image(name):
                continue
            if name in self._members:
                raise UserError(f"{uri} holds two images named {name!r}: remove the wrong one.")
            if member.flag_bits & 1:
                raise UserError(f"The image {name!r} in {uri} is encrypted: zip without password.")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"The image {name!r} in {uri} is compressed by a rare method: zip as usual."
                )
            _check_size(name, member.file_size, uri)
            self._members[name] = member

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Name -> bytes of all images."""
        return {name: member.file_size for name, member in self._members.items()}

    def sources(self) -> dict[str, str]:
        """Return what identifies the images."""
        return {ZIP: file_sha256(self._file)}

    def read(self, name: str) -> bytes:
        """Return an image's file.

        Raises:
            UserError: it is not there, or damaged.
        """
        if name not in self._members:
            raise _missing(name, self.where)
        member = self._members[name]
        try:
            with self._archive.open(member) as file:
                # With a limit: the directory may promise less than would be inflated.
                data = file.read(_LARGEST)
        except _BROKEN_ZIP as error:
            raise UserError(
                f"The image {name} in {self.where} is damaged ({error}): download the zip again."
            ) from error
        if len(data) != member.file_size:
            raise UserError(
                f"The image {name} in {self.where} has {len(data)} bytes instead of "
                f"{member.file_size}: download the zip again."
            )
        return data


class _Folder:
    """The images in a folder."""

    def __init__(self, uri: str) -> None:
        self.where = uri

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Name -> bytes of all images, in the order of their names.

        Raises:
            UserError: there are none, or one that is too large.
        """
        files = storage.list_files(self.where)
        sizes = {name: size for name, size in sorted(files.items()) if _is_image(name)}
        if not sizes:
            raise UserError(
                f"There is no {ZIP} and there are no JPEGs in {self.where}: correct --source."
            )
        for name, size in sizes.items():
            _check_size(name, size, self.where)
        return sizes

    def sources(self) -> dict[str, str]:
        """Return what identifies the images: to read them all would take as long as the build."""
        text = "".join(f"{name} {size}\n" for name, size in self.sizes.items())
        name = f"{FOLDER}, names and sizes of {len(self.sizes)} files"
        return {name: hashlib.sha256(text.encode()).hexdigest()}

    def read(self, name: str) -> bytes:
        """Return an image's file.

        Raises:
            UserError: it is not there.
        """
        return storage.read_bytes(storage.join(self.where, name))


def describe(
    source: str | None, name: str, *, crop: str = "c128", limit: int | None = None
) -> Source:
    """Return what there is to build, after reading lists and directory anew.

    Raises:
        UserError: a file is missing or damaged, or the lists and the images do not fit each other.
    """
    if source is None:
        raise UserError(
            f"{name} needs --source: the folder or s3:// URI that holds {ZIP} and its lists."
        )
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}, but must be at least 1.")
    _lists.cache_clear()
    _images.cache_clear()
    lists, images = _lists(source), _images(source)
    for file_name in lists.attributes:
        if file_name not in images.sizes:
            raise _missing(file_name, images.where)
    for file_name in images.sizes:
        if file_name not in lists.attributes:
            raise UserError(
                f"{images.where} has an image {file_name!r}, which {PARTITION} does not list: take "
                "both from the same release."
            )
    return Source(
        dataset=name,
        image_shape=(3, SIDE, SIDE),
        splits={split: len(files[:limit]) for split, files in lists.splits.items()},
        sources={**images.sources(), **lists.sources},
        settings={"crop": crop, "limit_per_split": limit, "split": "official"},
        label_names=lists.attribute_names,
    )


def read(
    source: str, split: str, start: int, stop: int, *, crop: str = "c128", limit: int | None = None
) -> Iterator[Sample]:
    """Yield the samples of one split from start to stop.

    Raises:
        UserError: an image is damaged, or none of the release.
    """
    lists = _lists(source)
    try:
        images = _images(source)
        for name in lists.splits[split][:limit][start:stop]:
            jpeg = images.read(name)
            try:
                image = cut(jpeg, crop)
            except (OSError, ValueError) as error:
                raise UserError(
                    f"The image {name} in {images.where} cannot be used ({error}): take it from "
                    "the release again."
                ) from error
            meta = {"attributes": list(lists.attributes[name]), "source": name}
            if lists.identities:
                meta["identity"] = lists.identities[name]
            yield Sample(name.removesuffix(".jpg"), image, meta)
    except Exception:
        _images.cache_clear()  # the next attempt opens the zip again
        raise


def cut(jpeg: bytes, crop: str) -> np.ndarray:
    """Return the image's central square as uint8 (3, 128, 128).

    Where it is resized, Pillow's ``BILINEAR`` weighs all pixels that a new one covers: it is
    antialiased where it shrinks, unlike the filter of that name in other libraries.

    Raises:
        ValueError: the image is not one of the aligned ones.
        OSError: its JPEG is damaged.
    """
    side = CROPS[crop]
    left, top = (WIDTH - side) // 2, (HEIGHT - side) // 2
    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        try:
            file = Image.open(io.BytesIO(jpeg), formats=["JPEG"])  # reads no more than its header
        except UnidentifiedImageError as error:
            raise ValueError("it is no JPEG") from error
        except _BOMBS as error:
            raise ValueError("it has far too many pixels") from error
    with file:
        if file.size != (WIDTH, HEIGHT):
            raise ValueError(f"it has {file.size} pixels instead of {(WIDTH, HEIGHT)}")
        square = file.crop((left, top, left + side, top + side)).convert("RGB")
    if side != SIDE:
        square = square.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


@functools.lru_cache(maxsize=1)
def _images(source: str) -> _Zip | _Folder:
    """Return where the images are."""
    uri, folder = storage.join(source, ZIP), storage.join(source, FOLDER)
    if storage.exists(uri):
        return _Zip(uri)
    return _Folder(folder if storage.exists(folder) else source)


@functools.lru_cache(maxsize=1)
def _lists(source: str) -> _Lists:
    """Return the annotations, looked through to their ends.

    Raises:
        UserError: one is missing or damaged, or they are not of one release.
    """
    sources: dict[str, str] = {}

    def rows(name: str) -> list[str]:
        uri = storage.join(source, name)
        if not storage.exists(uri):
            raise UserError(f"There is no {name} in {source}: it belongs beside {ZIP}.")
        raw = storage.read_bytes(uri)
        sources[name] = hashlib.sha256(raw).hexdigest()
        try:
            return raw.decode("ascii").rstrip().splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{uri} is no text file ({error}): download it again.") from error

    attribute_names, attributes = _attributes(storage.join(source, ATTRIBUTES), rows(ATTRIBUTES))

    def column(name: str, value: str, meaning: str) -> list[str]:
        """Return the values of a list that must have a row for each image, in the same order."""
        where = storage.join(source, name)
        names, values = [], []
        for row in rows(name):
            parts = row.split()
            if len(parts) != 2 or not re.fullmatch(value, parts[1]):
                raise UserError(
                    f"{where} says {row[:80]!r}, where a file name and {meaning} is expected: "
                    "download it again."
                )
            names.append(parts[0])
            values.append(parts[1])
        both = itertools.zip_longest(names, attributes, fillvalue="nothing")
        for number, (ours, theirs) in enumerate(both, start=1):
            if ours != theirs:
                raise UserError(
                    f"{where} does not fit {ATTRIBUTES}: row {number} is of {ours[:80]!r} here and "
                    f"of {theirs!r} there; take both from the same release."
                )
        return values

    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, part in zip(attributes, column(PARTITION, "[012]", "0, 1 or 2"), strict=True):
        splits[SPLITS[int(part)]].append(name)
    identities = {}
    if storage.exists(storage.join(source, IDENTITY)):
        numbers = column(IDENTITY, "[0-9]{1,9}", "the number of a person")
        identities = dict(zip(attributes, map(int, numbers), strict=True))
    return _Lists(splits, attributes, attribute_names, identities, sources)


def _attributes(where: str, rows: list[str]) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """Return the attributes' names, and file name -> a 0 or 1 for each of them."""
    if len(rows) < 2 or not rows[0].strip().isdecimal():
        raise UserError(f"{where} does not start with the number of its rows: download it again.")
    if rows[0].strip() != str(len(rows) - 2):
        raise UserError(
            f"{where} says {rows[0].strip()[:20]} rows, but has {len(rows) - 2}: download it again."
        )
    if len(rows) == 2:
        raise UserError(f"{where} lists no images: nothing to build.")
    names = tuple(rows[1].split())
    if len(set(names)) != NUM_ATTRIBUTES:
        raise UserError(
            f"{where} names {len(set(names))} attributes instead of {NUM_ATTRIBUTES}: download it "
            "again."
        )
    attributes: dict[str, bytes] = {}
    for number, row in enumerate(rows[2:], start=1):
        name, *values = row.split() or [""]
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{where} has {name[:80]!r} in row {number}, where the name of a JPEG is expected: "
                "download it again."
            )
        if len(values) != NUM_ATTRIBUTES or not _SIGNS.issuperset(values):
            raise UserError(
                f"The row of {name} in {where} has not {NUM_ATTRIBUTES} values -1 or 1: download "
                "it again."
            )
        if name in attributes:
            raise UserError(f"{where} has two rows of {name}: download it again.")
        attributes[name] = bytes(map("1".__eq__, values))
    return names, attributes


def _is_image(name: str) -> bool:
    """Return whether a file directly in the folder looks like an image."""
    return "/" not in name and name.lower().endswith((".jpg", ".jpeg"))


def _check_size(name: str, size: int, where: str) -> None:
    """Raise a UserError before anybody makes room for an absurd image."""
    if size > _LARGEST:
        raise UserError(
            f"The image {name!r} in {where} says that it has {size} bytes, which no image of the "
            "release has: take it from there again."
        )


def _missing(name: str, where: str) -> UserError:
    return UserError(
        f"{where} has no image {name}, which {PARTITION} lists: take both from the same release."
    )
