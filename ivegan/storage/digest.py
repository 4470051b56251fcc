"""Canonical JSON and sha256: one definition for configurations, data, records and caches."""

import contextlib
import hashlib
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

from ivegan.storage.schema import DamagedError, inside, read

log = logging.getLogger(__name__)

_SUMS = "sums.json"
_PIECE = 1 << 24  # an object store is asked for each


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a plain value: sorted keys, no blanks, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """Return the sha256 of the bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """Return the sha256 of a plain value's canonical JSON."""
    return sha256_hex(canonical_json(value))


def file_sha256(file: io.BufferedReader) -> str:
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
    """Return whether a folder is there, with the files that ``write_sums`` saw.

    Files are read again only where their size or time differs from the stored one. A damaged folder
    is deleted, to be made again.
    """
    if not folder.is_dir():
        return False
    with contextlib.suppress(OSError, ValueError, DamagedError):
        sums = read((folder / _SUMS).read_bytes(), dict[str, tuple[str, int, int]], _SUMS)
        changed = [n for n, (_, *stamp) in sums.items() if stamp != _stamp(folder / inside(n))]
        if sums and all(_sum(folder / name)[0] == sums[name][0] for name in changed):
            if changed:  # copied, for example
                write_sums(folder)
            return True
    log.warning("%s in the cache is damaged: making it again", folder)
    shutil.rmtree(folder)
    return False


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _sum(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [file_sha256(file), *_stamp(path)]
