"""Canonical JSON and sha256: one definition for configurations, data, records and caches."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ivegan.storage.schema import DamagedError, check, inside, parse_json

_SUMS = "sums.json"
_PIECE = 1 << 24  # an object store is asked for each


@dataclass(frozen=True)
class _Sums:
    """The content of ``sums.json``."""

    files: dict[str, tuple[str, int, int]]
    """Digest, size and time."""


@runtime_checkable
class Readable(Protocol):
    """An open file of bytes, of this machine or of an object store."""

    def read(self, size: int, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a plain value: sorted keys, no blanks, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """Return the sha256 of the bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Return the sha256 of a plain value's canonical JSON."""
    return sha256_hex(canonical_json(value))


def file_sha256(file: Readable) -> str:
    """Return the sha256 of an open file from its start, read in pieces."""
    file.seek(0)
    found = hashlib.sha256()
    while piece := file.read(_PIECE):
        found.update(piece)
    return found.hexdigest()


def write_sums(folder: Path) -> None:
    """Write the digest, size and time of each file of a folder into ``sums.json``."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != _SUMS)
    (folder / _SUMS).write_text(json.dumps({path.name: _sum(path) for path in files}))


def is_sound(folder: Path) -> bool:
    """Return whether a folder's files are those that ``write_sums`` saw.

    Files are read again only where their size or time differs from the stored one.
    """
    with contextlib.suppress(OSError, ValueError, DamagedError):
        stored = parse_json((folder / _SUMS).read_bytes(), _SUMS)
        sums = check({"files": stored}, _Sums, _SUMS).files
        changed = [n for n, (_, *stamp) in sums.items() if stamp != _stamp(folder / inside(n))]
        if any(_sum(folder / name)[0] != sums[name][0] for name in changed):
            return False
        if changed:  # copied, for example
            write_sums(folder)
        return bool(sums)
    return False


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _sum(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [file_sha256(file), *_stamp(path)]
