"""Description of a raw data set, and names and digests of raw files."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any


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


def is_litter(name: str) -> bool:
    """Return whether a file is one that macOS and Windows leave in folders and zips."""
    parts = PurePosixPath(name).parts
    return "__MACOSX" in parts or any(part.startswith(".") for part in parts)


def nearest(wanted: str, names: Iterable[str]) -> str:
    """Return the end of a message about a missing file: the nearest name among those found."""
    by_name = {PurePosixPath(name).name: name for name in names if not is_litter(name)}
    if close := difflib.get_close_matches(wanted, by_name, n=1, cutoff=0.75):
        return f"the nearest file there is {by_name[close[0]]}"
    return "nothing there has a similar name"
