"""MNIST, or any other data set in its layout: four IDX files, gzipped or not.

Images of 28 x 28 are padded with zeros to 32 x 32, not resized: the networks halve five times, and
the margin leaves room for shifts. The official test file is ``test``; of the official training
file the last twelfth (5,000 of 60,000) is ``valid`` and what comes before it ``train``.

The files may also be fetched: see ``fetched``.
"""

import functools
import gzip
import hashlib
import http.client
import io
import itertools
import logging
import math
import re
import struct
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.source import Source, is_litter, nearest
from ivegan import storage
from ivegan.data.tars import Sample
from ivegan.errors import UserError, public
from ivegan.storage.digest import sha256_hex

log = logging.getLogger(__name__)

OPTIONS = frozenset[str]()
SIDE = 32
VALID_SHARE = 12
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Names of public copies: train-images.idx3-ubyte, emnist-letters-test-labels-idx1-ubyte.gz, …
_COPY = re.compile(r"(?:.*[-_])?(train|t10k|test)-(images|labels)[-.]idx[13][-.]ubyte(?:\.gz)?")
DOWNLOAD = "download"  # as --source
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MD5 = {  # as published with MNIST
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")
_UNSIGNED_BYTES = 0x08
_LARGEST = 1 << 30  # values of a file; MNIST has 47 million, EMNIST 547 million
_DENSEST = 100  # values in a byte of a gzipped file of some size; those of MNIST have 5
_TIMEOUT = 30.0  # seconds without a byte from a mirror


class _Half(NamedTuple):
    """The official training or test half."""

    images: np.ndarray  # (n, height, width)
    labels: np.ndarray  # (n,)
    sources: dict[str, str]


def describe(source: str | None, name: str) -> Source:
    """Return what there is to build, after reading the files anew.

    Raises:
        UserError: a file is missing, truncated, or not the IDX file that its name promises.
    """
    if source is None:
        raise UserError(
            f"{name} needs --source: the folder or s3:// URI of the four IDX files, or {DOWNLOAD}."
        )
    if storage.exists(source) and not (storage.list_names(source) or Path(source).is_dir()):
        raise UserError(f"{source} is one file: unpack it, and give the folder of its IDX files.")
    _half.cache_clear()
    places, (first, last) = _places(source), _classes(source)
    return Source(
        dataset=name,
        image_shape=(1, SIDE, SIDE),
        splits={split: len(own) for split, own in places.items()},
        sources=_half(source, "train").sources | _half(source, "test").sources,
        settings={
            "image": f"zero padded to {SIDE}x{SIDE}",
            "split": f"valid is the last 1/{VALID_SHARE} of the training file",
        },
        label_names=tuple(str(label) for label in range(first, last + 1)),
    )


def read(source: str, split: str, start: int, stop: int) -> Iterator[Sample]:
    """Yield the samples of one split from start to stop."""
    half = _half(source, "test" if split == "test" else "train")
    (file, _), (lowest, _) = half.sources, _classes(source)
    for number, place in enumerate(_places(source)[split][start:stop], start):
        image = half.images[place]
        spare = [SIDE - side for side in image.shape]
        padded = np.pad(image, [(room // 2, room - room // 2) for room in spare])
        meta = {"label": int(half.labels[place]) - lowest, "source": f"{file}#{place}"}
        yield Sample(f"{split}-{number:06d}", padded[None], meta)


def _places(source: str) -> dict[str, range]:
    """Return where each split's samples lie in the file of its half."""
    total, test = (len(_half(source, name).images) for name in ("train", "test"))
    first = total - total // VALID_SHARE
    return {"train": range(first), "valid": range(first, total), "test": range(test)}


def fetched(source: str, out: str) -> str:
    """Return where the files are, after downloading them if the source says so.

    Args:
        source: ``download`` for MNIST from a public mirror; ``http(s)://…`` for the folder of
            another mirror, or of another data set in MNIST's layout, whose check sums are not
            those of MNIST. Anything else is returned as it is.
        out: folder or URI of the data set to build; the files go to ``raw_uri``.

    Raises:
        UserError: as for ``download``.
    """
    if not is_remote(source):
        return source
    to, published = raw_uri(out), source == DOWNLOAD
    download(to, MIRRORS if published else [source], published=published)
    return to


def raw_uri(out: str) -> str:
    """Return where downloaded files are kept, beside the data set."""
    return storage.absolute(out) + "-raw"


def is_remote(source: str) -> bool:
    """Return whether the files must be downloaded first."""
    return source == DOWNLOAD or source.startswith(("http://", "https://"))


def download(to: str, mirrors: Sequence[str], *, published: bool = True) -> None:
    """Put the four gzipped IDX files into a folder, each only when it is whole and checked.

    Args:
        to: folder or s3:// URI.
        mirrors: URLs of folders, tried in this order for each file.
        published: require MNIST's published check sums, and download no file again that has its
            own. Otherwise all are downloaded: existing ones may have come from another URL.

    Raises:
        UserError: no mirror gives the right files, or they cannot be written.
    """
    if any("@" in mirror.partition("://")[2].partition("/")[0] for mirror in mirrors):
        raise UserError("--source holds a user or password: download the four files yourself.")
    for file in itertools.chain(*FILES.values()):
        name, num_axes = f"{file}.gz", 3 if "images" in file else 1
        uri = storage.join(to, name)
        if published and storage.exists(uri) and _md5(storage.read_bytes(uri)) == MD5[name]:
            continue
        reasons = []
        for url in (f"{mirror.rstrip('/')}/{name}" for mirror in mirrors):
            try:
                with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
                    raw = answer.read(_LARGEST)
                _parse_idx(raw, name, num_axes)
                if published and _md5(raw) != MD5[name]:
                    raise UserError("it has another md5 than published")
            except (OSError, http.client.HTTPException, ValueError, UserError) as error:
                reasons.append(f"{url}: {' '.join(str(error).split())}".rstrip("."))
                log.info("%s", public(reasons[-1]))
            else:
                storage.write_bytes(uri, raw)
                break
        else:
            raise UserError(
                f"{name} cannot be downloaded ({'; '.join(reasons)}): get the four files in "
                "another way, and name their folder with --source."
            )


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@functools.lru_cache(maxsize=2)
def _half(source: str, half: str) -> _Half:
    """Return the images and labels of one half, and the files they came from."""
    images_file, labels_file = FILES[half]
    images, images_source = _read_idx(source, images_file, num_axes=3)
    labels, labels_source = _read_idx(source, labels_file, num_axes=1)
    if not 0 < len(images) == len(labels):
        raise UserError(
            f"{images_file} holds {len(images)} images, but {labels_file} {len(labels)} labels: "
            "download both again."
        )
    if not 1 <= min(images.shape[1:]) <= max(images.shape[1:]) <= SIDE:
        raise UserError(
            f"The images of {images_file} in {source} have {images.shape[1]} x {images.shape[2]} "
            f"pixels instead of 1 x 1 to {SIDE} x {SIDE}: resize them."
        )
    return _Half(images, labels, images_source | labels_source)


def _read_idx(source: str, name: str, num_axes: int) -> tuple[np.ndarray, dict[str, str]]:
    """Return an IDX file's array, and its file name with its sha256."""
    file = _find(source, name)
    uri = storage.join(source, file)
    raw = storage.read_bytes(uri)
    return _parse_idx(raw, uri, num_axes), {file.rpartition("/")[2]: sha256_hex(raw)}


def _classes(source: str) -> tuple[int, int]:
    """Return the lowest and the highest label; classes are counted from the lowest."""
    labels = [_half(source, half).labels for half in FILES]
    return int(min(map(np.min, labels))), int(max(map(np.max, labels)))


def _find(source: str, name: str) -> str:
    """Return the name of an IDX file in the source, or in a folder below it."""
    found = [n for n in storage.list_files(source) if not is_litter(n)]
    names = [n for n in (f"{name}.gz", name) if n in found][:1]
    names = names or [n for n in found if _part(n) == _part(name)]
    if not names:
        archive = next((n for n in found if n.lower().endswith(_ARCHIVES)), None)
        hint = f"{archive} is there: unpack it" if archive else nearest(name, found)
        raise UserError(f"There is no {name}.gz or {name} in {source} ({hint}): correct --source.")
    least = min(n.count("/") for n in names)
    sets = {_data_set(n) for n in names if n.count("/") == least}
    if len(sets) > 1:
        raise UserError(
            f"{source} holds several data sets, {' and '.join(sorted(names)[:2])} for instance: "
            "give the folder of one."
        )
    return min(names, key=lambda n: (n.count("/"), n))


def _data_set(name: str) -> tuple[str, str]:
    """Return folder and name of an IDX file, which may lie in a folder of its own name."""
    folder, _, file = name.rpartition("/")
    stem = file.removesuffix(".gz").replace(".", "-")
    above, _, last = folder.rpartition("/")
    return (above if last.replace(".", "-") == stem else folder), stem


def _part(name: str) -> tuple[str, str] | None:
    """Return half and kind of an IDX file by its name, whatever its data set; None for others."""
    found = _COPY.fullmatch(name.rpartition("/")[2].lower())
    return found and (found[1].replace("t10k", "test"), found[2])


def _parse_idx(raw: bytes, uri: str, num_axes: int) -> np.ndarray:
    """Return the array of an IDX file, unpacking no more than its header promises."""
    file = gzip.GzipFile(fileobj=io.BytesIO(raw)) if uri.endswith(".gz") else io.BytesIO(raw)
    # Two zero bytes, the type of the values, the number of axes; then each axis's length.
    magic = bytes([0, 0, _UNSIGNED_BYTES, num_axes])
    try:
        header = file.read(4 + 4 * num_axes)
        if header[:4] != magic:
            raise UserError(
                f"{uri} is no IDX file of {num_axes} axes: it starts with 0x{header[:4].hex()} "
                f"instead of 0x{magic.hex()}."
            )
        shape = struct.unpack(f">{num_axes}I", header[4:])
        total = math.prod(shape)
        if total > _LARGEST:
            raise UserError(
                f"{uri} claims to hold {total:,} values, but at most {_LARGEST:,} can be read: "
                "take a smaller one."
            )
        if total > max(1 << 24, _DENSEST * len(raw)):
            raise UserError(
                f"{uri} claims to hold {total:,} values in {len(raw):,} bytes: download it again."
            )
        data = file.read(total + 1)  # one more, to reach the end and gzip's check sum there
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{uri} is damaged ({error}): download it again.") from error
    if len(data) != total:
        count = f"more than {total}" if len(data) > total else f"{len(data)}"
        raise UserError(
            f"{uri} is truncated or too long: it holds {count} values instead of {total}; download "
            "it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
