"""Small data sets that tests write, all files of a folder, and a server of them."""

import dataclasses
import functools
import gzip
import http.server
import io
import struct
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from data_prep import celeba
from ivegan.data.manifest import Manifest, Shard, read_manifest, shard_key, write_manifest
from ivegan.data.tars import Sample, write_tar
from ivegan.storage.digest import digest, sha256_hex


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file, by its name below the folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def flip(path: Path, place: int = -1) -> None:
    """Change a bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def write_dataset(folder: Path, shards: Sequence[Sequence[Sample]]) -> str:
    """Write a data set of one split, train, shard by shard, and return its URI."""
    entries, (channels, height, width) = [], shards[0][0].image.shape
    (folder / "train").mkdir(parents=True)
    for number, samples in enumerate(shards):
        raw, _ = write_tar(samples)
        key, sha256 = shard_key("train", number), sha256_hex(raw)
        (folder / key).write_bytes(raw)
        size = {"samples": len(samples), "bytes": len(raw)}
        entries.append(Shard(split="train", key=key, sha256=sha256, **size))
    manifest = Manifest(
        dataset="made",
        image_shape=(channels, height, width),
        splits={"train": sum(entry.samples for entry in entries)},
        shards=tuple(entries),
        sources={},
        settings={},
        settings_hash=digest({}),
    )
    write_manifest(str(folder), manifest)
    return str(folder)


def change_manifest(folder: Path, **changes: Any) -> None:
    """Write a data set's manifest with other values."""
    manifest = read_manifest(str(folder))
    write_manifest(str(folder), dataclasses.replace(manifest, **changes))


def idx(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """Return an IDX file, whose header may be made to lie."""
    shape = shape or array.shape
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + array.tobytes()


def write_idx(folder: Path, train: int, test: int, packed: bool = False) -> Path:
    """Write a folder in MNIST's layout, whose images are gzipped if packed; return it."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for half, count in (("train", train), ("t10k", test)):
        images = idx(random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        name, content = (".gz", gzip.compress(images)) if packed else ("", images)
        (folder / f"{half}-images-idx3-ubyte{name}").write_bytes(content)
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def write_faces(folder: Path, size: tuple[int, int] = (178, 218)) -> Path:
    """Write a folder in CelebA's layout, with 5 + 3 + 2 random images in a zip; return it."""
    folder.mkdir(parents=True)
    random, parts = np.random.default_rng(0), "0000011122"
    names = [f"{i + 1:06d}.jpg" for i in range(len(parts))]
    with zipfile.ZipFile(folder / celeba.ZIP, "w") as archive:
        archive.writestr("img_align_celeba/", b"")
        for name in names:
            jpeg = io.BytesIO()
            pixels = random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(jpeg, "jpeg")
            archive.writestr(f"img_align_celeba/{name}", jpeg.getvalue())
    attributes = [" ".join(f"Attribute_{i}" for i in range(40)) + " "]
    for number, name in enumerate(names):
        values = [1 if (number >> bit) & 1 else -1 for bit in range(40)]
        attributes.append(f"{name} " + " ".join(f"{value:2d}" for value in values))
    (folder / celeba.ATTRIBUTES).write_text("\n".join([str(len(names)), *attributes]) + "\n")
    rows = [f"{name} {part}\n" for name, part in zip(names, parts, strict=True)]
    (folder / celeba.PARTITION).write_text("".join(rows))
    (folder / celeba.IDENTITY).write_text("".join(f"{n} {i}\n" for i, n in enumerate(names)))
    return folder


class Mirror(http.server.ThreadingHTTPServer):
    """A server of the files in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Answers, directory=str(folder)))
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()


class _Answers(http.server.SimpleHTTPRequestHandler):
    def log_request(self, code: object = "-", size: object = "-") -> None:
        cast(Mirror, self.server).asked.append(self.path[1:])
