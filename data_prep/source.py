"""Description of a raw data set, and names and digests of raw files."""

import hashlib
from dataclasses import dataclass
from typing import IO, Any

_PIECE = 1 << 24  # an object store is asked for each


@dataclass(frozen=True, kw_only=True)
class Source:
    """The raw data set, described before anything is written."""

    dataset: str
    """Name in the manifest."""
    image_shape: tuple[int, int, int]
    """Channels, height, width of what comes out."""
    splits: dict[str, int]
    """Samples per split."""
    sources: dict[str, str]
    """Raw files: name -> sha256; or what else was digested, as the name says."""
    settings: dict[str, Any]
    """What was chosen in the preparation, for the manifest."""
    label_names: tuple[str, ...]
    """Classes by label, or attributes by column."""


def file_sha256(file: IO[bytes]) -> str:
    """Return the sha256 of an open file from its start, read in pieces."""
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()
