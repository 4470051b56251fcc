"""What a raw data set tells ``build`` about itself, and how raw files are named and digested."""

import hashlib
from dataclasses import dataclass
from typing import Any

from ivegan import storage


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
    """Raw files: name -> sha256."""
    settings: dict[str, Any]
    """What was chosen in the preparation, for the manifest."""
    label_names: tuple[str, ...]
    """Classes by label, or attributes by column."""


def file_sha256(uri: str) -> str:
    """Return the sha256 of a file, read in pieces."""
    with storage.open_file(uri) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
