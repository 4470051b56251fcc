"""Files on this machine and in an object store, under one set of names.

A URI is a local path, ``file://…`` or ``s3://bucket/key``. One session of botocore says how the
store is reached, in ``objects``; ``environment`` hands that to MLflow, Metaflow and other nodes,
without keys, and Ray works through the same client. Files appear whole or not at all.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ivegan.storage import local, objects
from ivegan.storage.errors import Missing, Unavailable, local_sentences, sentences
from ivegan.storage.objects import environment, longer_retries, s3_client
from ivegan.storage.places import absolute, is_local, join, parse

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = [
    "Missing",
    "Unavailable",
    "absolute",
    "create_bytes",
    "delete_folder",
    "environment",
    "exists",
    "filesystem",
    "is_inside",
    "is_local",
    "join",
    "list_files",
    "list_names",
    "local_sentences",
    "longer_retries",
    "open_file",
    "read_bytes",
    "s3_client",
    "write_bytes",
    "write_folder",
]


def filesystem(uri: str | Path) -> "tuple[pyarrow.fs.FileSystem, str]":
    """Return pyarrow's file system for a URI, and the path in it, for Ray's storage."""
    from pyarrow import fs

    place = parse(uri)
    if isinstance(place, Path):
        return fs.LocalFileSystem(), str(place)
    from ivegan.storage.arrow import ObjectFiles

    return fs.PyFileSystem(ObjectFiles()), "/".join(place).rstrip("/")


def exists(uri: str | Path) -> bool:
    """Return whether there is a file, or a folder that is not empty."""
    with sentences(uri) as place:
        if isinstance(place, Path):
            return place.exists()
        bucket, key = place
        if key and objects.head(place) is not None:
            return True
        prefix = f"{key}/" if key else ""
        return s3_client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)["KeyCount"] > 0


def is_inside(folder: str | Path, name: str) -> bool:
    """Return whether a name below a folder stays there, links of this machine followed."""
    place, file = parse(folder), parse(join(folder, name))
    if isinstance(place, Path) and isinstance(file, Path):
        return file.resolve().is_relative_to(place.resolve())
    return True


def read_bytes(uri: str | Path) -> bytes:
    """Return a file's content; an object's digest is checked if it has one.

    Raises:
        UserError: no such file, no access to it, or a wrong digest.
    """
    with sentences(uri) as place:
        if isinstance(place, Path):
            return place.read_bytes()
        return objects.download(place)


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Write a file, which holds the old content or the new one at every moment."""
    with sentences(uri) as place:
        if isinstance(place, Path):
            with local.new_file(place) as file:
                file.write(data)
        else:
            objects.upload(place, data)


def create_bytes(uri: str | Path, data: bytes) -> bytes:
    """Write a file unless it exists, and return the content that it has then.

    Locally, and in a store whose conditional writes are atomic, all who call this at once get the
    same content. Some stores check and write in two steps: compare again before relying on it.
    """
    with sentences(uri) as place:
        if isinstance(place, Path):
            local.create(place, data)
        else:
            objects.create(place, data)
    return read_bytes(uri)


def open_file(uri: str | Path, buffer_size: int = objects.READ_AHEAD) -> io.BufferedReader:
    """Return a seekable file for reading in place: an archive need not be copied first.

    Raises:
        UserError: no such file, no access to it, or it was replaced while it was read.
    """
    with sentences(uri) as place:
        if isinstance(place, Path):
            return place.open("rb")
        return io.BufferedReader(objects.ObjectFile(place), buffer_size)


def list_names(uri: str | Path) -> list[str]:
    """Return the names directly below a folder, sorted; none if it does not exist."""
    with sentences(uri) as place:
        if isinstance(place, Path):
            return sorted(child.name for child in place.iterdir()) if place.is_dir() else []
        return objects.list_names(place)


def list_files(uri: str | Path) -> dict[str, int]:
    """Return all files below a folder, at any depth: relative name with slashes -> bytes."""
    with sentences(uri) as place:
        if isinstance(place, Path):
            return local.sizes(place)
        # Consoles make an empty object for a folder, whose name ends in a slash.
        found = objects.list_objects(place)
        return {n: size for n, size in found.items() if n and not n.endswith("/")}


def write_folder(uri: str | Path, files: Mapping[str, bytes], last: str) -> None:
    """Write files, name -> content, as a folder in place of an existing one.

    Locally it appears by one renaming. To an object store the file ``last`` goes last, to mark the
    folder as whole.
    """
    with sentences(uri) as place:
        if isinstance(place, Path):
            local.replace_folder(files, place)
            return
    delete_folder(uri, first=last)
    for name in sorted(files, key=lambda name: (name == last, name)):
        write_bytes(join(uri, name), files[name])


def delete_folder(uri: str | Path, first: str | None = None) -> None:
    """Delete all files below the URI, the marker file first, so that no remainder looks whole."""
    with sentences(uri) as place:
        if isinstance(place, Path):
            local.delete_folder(place)
        else:
            objects.delete_objects(place, first)
