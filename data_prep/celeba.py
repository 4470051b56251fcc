"""CelebA, aligned: JPEGs of 178 x 218, in ``img_align_celeba.zip`` or in a folder.

The zip is read in place; without one, the JPEGs are looked for in ``img_align_celeba``, then in the
source itself. Beside them stand ``list_attr_celeba.txt`` and ``list_eval_partition.txt``, and
optionally ``identity_CelebA.txt``; the layouts of the official drive (``Anno/``, ``Eval/``,
``Img/``), torchvision (``celeba/``) and Kaggle (CSV lists, a nested folder) are read too. The
official split is kept. The central 128 x 128 pixels are cut out (``c128``), as the paper says;
``c178r128`` cuts out 178 x 178 and resizes, as others do whose Frechet distances one may want to
compare with. A subset with shorter lists is taken as it is, but lists and images must be of one
release: the same names, in the lists in the same order.

Lists and zip are read once per process, not per shard: both tell of 202,599 images.
"""

import functools
import io
import itertools
import re
import struct
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_prep.source import Source, is_litter, nearest
from ivegan import storage
from ivegan.data.manifest import SPLITS
from ivegan.data.tars import Sample
from ivegan.errors import UserError
from ivegan.storage.digest import file_sha256, sha256_hex

OPTIONS = frozenset({"crop", "limit"})
SIDE = 128
WIDTH, HEIGHT = 178, 218
ZIP = "img_align_celeba.zip"
FOLDER = "img_align_celeba"
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
IDENTITY = "identity_CelebA.txt"
_PLACES = ("", "Img", "Anno", "Eval", "celeba")  # of the official drive, and of torchvision
NUM_ATTRIBUTES = 40
CROPS = {"c128": 128, "c178r128": 178}
_LARGEST = 4 << 20  # bytes of a JPEG; those of the release have less than 20,000
_NAME = re.compile(r"[\w-]+\.jpg", re.ASCII)
_SIGNS = frozenset({"-1", "1"})
# All that zipfile and zlib raise for a damaged file.
_BROKEN_ZIP = (
    zipfile.BadZipFile,
    KeyError,  # an image that went since the directory was read
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    struct.error,
    zlib.error,
)


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
        """Open the zip and read its directory."""
        self.where = uri
        self._file = storage.open_file(uri)
        weakref.finalize(self, self._file.close)
        try:
            self._archive = zipfile.ZipFile(self._file)
        except _BROKEN_ZIP as error:
            raise UserError(f"{uri} is damaged ({error}): download it again.") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._archive.infolist():
            # The images' folder differs between releases, so the last part is what counts.
            name = PurePosixPath(member.filename).name
            if is_litter(member.filename) or not _is_image(name):
                continue
            if name in self._members:
                raise UserError(f"{uri} holds two images named {name!r}: remove the wrong one.")
            self._members[name] = member
        self.names = self._members.keys()

    def sources(self) -> dict[str, str]:
        """Return what identifies the images."""
        return {ZIP: file_sha256(self._file)}

    def read(self, name: str) -> bytes:
        """Return an image's file."""
        try:
            with self._archive.open(self._members[name]) as file:
                return file.read(_LARGEST)  # without a limit, all would be inflated at once
        except _BROKEN_ZIP as error:
            raise UserError(
                f"The image {name} in {self.where} is damaged ({error}): download the zip again."
            ) from error


class _Folder:
    """The images in a folder."""

    def __init__(self, uri: str) -> None:
        """List the images."""
        self.where = uri
        files = sorted(storage.list_files(uri).items())
        self._sizes = {name: size for name, size in files if _is_image(name)}
        if not self._sizes:
            raise UserError(f"There is no {ZIP} and there are no JPEGs in {uri}: correct --source.")
        self.names = self._sizes.keys()

    def sources(self) -> dict[str, str]:
        """Return what identifies the images: to read them all would take as long as the build."""
        text = "".join(f"{name} {size}\n" for name, size in self._sizes.items())
        name = f"{FOLDER}, names and sizes of {len(self._sizes)} files"
        return {name: sha256_hex(text.encode())}

    def read(self, name: str) -> bytes:
        """Return an image's file."""
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
        if file_name not in images.names:
            raise UserError(
                f"{images.where} has no image {file_name}, which {PARTITION} lists: take both from "
                "the same release."
            )
    for file_name in images.names:
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
    lists, images = _lists(source), _images(source)
    for name in lists.splits[split][:limit][start:stop]:
        jpeg = images.read(name)
        try:
            image = cut(jpeg, crop)
        except (OSError, ValueError) as error:
            raise UserError(
                f"The image {name} in {images.where} cannot be used ({error}): take it from the "
                "release again."
            ) from error
        meta = {"attributes": list(lists.attributes[name]), "source": name}
        if lists.identities:
            meta["identity"] = lists.identities[name]
        yield Sample(name.removesuffix(".jpg"), image, meta)


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
    try:
        file = Image.open(io.BytesIO(jpeg), formats=["JPEG"])  # reads no more than its header
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError("it is no JPEG of an aligned image") from error
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
    if uri := _find(source, ZIP):
        return _Zip(uri)
    folder = _find(source, FOLDER) or source
    return _Folder(_find(folder, FOLDER) or folder)  # Kaggle's is nested


def _find(source: str, name: str) -> str | None:
    """Return the URI of a file or folder in the source, or in a folder of the public copies."""
    uris = [storage.join(source, *(part for part in (place, name) if part)) for place in _PLACES]
    return next((uri for uri in uris if storage.exists(uri)), None)


@functools.lru_cache(maxsize=1)
def _lists(source: str) -> _Lists:
    """Return the annotations, checked to their ends."""
    sources: dict[str, str] = {}

    def rows(name: str) -> list[str]:
        uri = _find(source, name) or _find(source, name.replace(".txt", ".csv"))
        if uri is None:
            hint = nearest(name, storage.list_names(source))
            raise UserError(f"There is no {name} in {source} ({hint}): it belongs beside {ZIP}.")
        raw = storage.read_bytes(uri)
        sources[uri.rpartition("/")[2]] = sha256_hex(raw)
        try:
            lines = raw.removeprefix(b"\xef\xbb\xbf").decode("ascii").rstrip().splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{uri} is no text file ({error}): download it again.") from error
        if not uri.endswith(".csv"):
            return lines
        # Kaggle's lists: a row of names, then the official rows with commas, without their number.
        head, *lines = [line.replace(",", " ") for line in lines] or [""]
        names = head.partition(" ")[2]
        return [str(len(lines)), names, *lines] if name == ATTRIBUTES else lines

    attribute_names, attributes = _attributes(storage.join(source, ATTRIBUTES), rows(ATTRIBUTES))

    def column(name: str, value: str, meaning: str) -> list[int]:
        """Return the values of a list that must have a row for each image, in the same order."""
        uri, values, line = storage.join(source, name), [], re.compile(rf"(\S+)\s+({value})\s*")
        for row, image in itertools.zip_longest(rows(name), attributes, fillvalue=""):
            found = line.fullmatch(row)
            if found is None or found[1] != image:
                raise UserError(
                    f"{uri} has the row {row[:80]!r} where {image or 'no image'!r}, as in "
                    f"{ATTRIBUTES}, and {meaning} are expected: take both from the same release."
                )
            values.append(int(found[2]))
        return values

    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, part in zip(attributes, column(PARTITION, "[012]", "0, 1 or 2"), strict=True):
        splits[SPLITS[part]].append(name)
    identities = {}
    if _find(source, IDENTITY):
        identities = dict(zip(attributes, column(IDENTITY, "[0-9]{1,9}", "a number"), strict=True))
    return _Lists(splits, attributes, attribute_names, identities, sources)


def _attributes(uri: str, rows: list[str]) -> tuple[tuple[str, ...], dict[str, bytes]]:
    """Return the attributes' names, and file name -> a 0 or 1 for each of them."""
    if len(rows) < 3 or rows[0].strip() != str(len(rows) - 2):
        raise UserError(
            f"{uri} must start with the number of its images, but has {max(0, len(rows) - 2)} rows "
            f"of them below {''.join(rows[:1])[:20]!r}: download it again."
        )
    names = tuple(rows[1].split())
    if len(set(names)) != NUM_ATTRIBUTES:
        raise UserError(
            f"{uri} names {len(set(names))} attributes instead of {NUM_ATTRIBUTES}: download it "
            "again."
        )
    attributes: dict[str, bytes] = {}
    for number, row in enumerate(rows[2:], start=1):
        name, *values = row.split() or [""]
        if not _NAME.fullmatch(name) or name in attributes:
            raise UserError(
                f"{uri} has {name[:80]!r} in row {number}, where the name of another JPEG is "
                "expected: download it again."
            )
        if len(values) != NUM_ATTRIBUTES or not _SIGNS.issuperset(values):
            raise UserError(
                f"The row of {name} in {uri} has not {NUM_ATTRIBUTES} values -1 or 1: download "
                "it again."
            )
        attributes[name] = bytes(map("1".__eq__, values))
    return names, attributes


def _is_image(name: str) -> bool:
    """Return whether a file directly in the folder looks like an image."""
    return "/" not in name and not is_litter(name) and name.lower().endswith((".jpg", ".jpeg"))
