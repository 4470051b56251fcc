"""Files on this machine and in an object store, under one set of names.

A URI is a local path, ``file://…`` or ``s3://bucket/key``. One session of botocore says how the
store is reached, in ``objects``; ``environment`` hands that to MLflow, Metaflow and other nodes,
without keys, and Ray works through the same client. Files appear whole or not at all.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ivegan.storage import local, objects
from ivegan.storage.errors import Unavailable, local_sentences, patiently, sentences
from ivegan.storage.objects import environment, longer_retries, s3_client
from ivegan.storage.places import absolute, is_local, join, parse

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = [
    "Unavailable",
    "absolute",
    "delete_folder",
    "environment",
    "exists",
    "filesystem",
    "is_inside",
    "is_local",
    "join",
    "list_files",
    "list_names",
    "longer_retries",
    "open_file",
    "patiently",
    "read_bytes",
    "s3_client",
    "upload_folder",
    "write_bytes",
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
    place = parse(uri)
    with sentences(uri):
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
    place = parse(uri)
    with sentences(uri):
        if isinstance(place, Path):
            return place.read_bytes()
        file = io.BytesIO()
        objects.download(place, file)
        return file.getvalue()


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Write a file, which holds the old content or the new one at every moment."""
    place = parse(uri)
    with sentences(uri):
        if isinstance(place, Path):
            with local.new_file(place) as file:
                file.write(data)
        else:
            objects.upload(place, io.BytesIO(data))


def create_bytes(uri: str | Path, data: bytes) -> bytes:
    """Write a file unless it exists, and return the content that it has then.

    Locally, and in a store whose conditional writes are atomic, all who call this at once get the
    same content. Some stores check and write in two steps: compare again before relying on it.
    """
    place = parse(uri)
    with sentences(uri):
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
    place = parse(uri)
    with sentences(uri):
        if isinstance(place, Path):
            return place.open("rb")
        return io.BufferedReader(cast(Any, objects.ObjectFile(place)), buffer_size)


def list_names(uri: str | Path) -> list[str]:
    """Return the names directly below a folder, sorted; none if it does not exist."""
    place = parse(uri)
    if isinstance(place, Path):
        with sentences(uri):
            return sorted(child.name for child in place.iterdir()) if place.is_dir() else []
    return sorted({name.partition("/")[0] for name in list_files(uri)})


def list_files(uri: str | Path) -> dict[str, int]:
    """Return all files below a folder, at any depth: relative name with slashes -> bytes."""
    place = parse(uri)
    with sentences(uri):
        return local.sizes(place) if isinstance(place, Path) else objects.list_objects(place)


def upload_folder(source: str | Path, uri: str | Path, last: str | None = None) -> None:
    """Copy a local folder to the URI, in place of an existing one.

    Args:
        source: the folder.
        uri: of the copy; locally it appears by one renaming.
        last: the file that is uploaded last to an object store, to mark the folder as whole.
    """
    place, source = parse(uri), Path(source)
    with sentences(uri):
        if isinstance(place, Path):
            local.replace_folder(source, place)
            return
        delete_folder(uri, first=last)
        bucket, key = place
        names = [path.relative_to(source).as_posix() for path in local.files(source)]
        for name in sorted(names, key=lambda name: (name == last, name)):
            path = source / name
            with sentences(join(uri, name)), local_sentences(path), path.open("rb") as file:
                objects.upload((bucket, f"{key}/{name}"), file)


def delete_folder(uri: str | Path, first: str | None = None) -> None:
    """Delete all files below the URI, if there are any.

    Args:
        uri: the folder.
        first: the marker file, deleted before all others so that no remainder looks whole.
    """
    place = parse(uri)
    with sentences(uri):
        if isinstance(place, Path):
            local.delete_folder(place)
        else:
            objects.delete_objects(place, first)
