"""Secrets in what programs leave behind."""

import contextlib
import gzip
from collections.abc import Iterable, Mapping
from pathlib import Path


def contents(folder: Path, but: Iterable[Path] = ()) -> dict[str, bytes]:
    """Return what the files below a folder hold, unpacked; servers may delete some meanwhile."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not any(path.is_relative_to(other) for other in but):
            with contextlib.suppress(FileNotFoundError):
                content = path.read_bytes()
                packed = content.startswith(b"\x1f\x8b")
                found[str(path)] = gzip.decompress(content) if packed else content
    return found


def leaks(secrets: Mapping[str, str], texts: Mapping[str, bytes]) -> dict[str, list[str]]:
    """Return by secret the names of texts that hold it."""
    found = {
        secret: [name for name, text in texts.items() if value.encode() in text]
        for secret, value in secrets.items()
    }
    return {secret: names for secret, names in found.items() if names}
