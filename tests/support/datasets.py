"""Data sets as tests look at them: whole tars, and all files of a folder."""

from collections.abc import Iterable
from pathlib import Path

from ivegan.data.shards import Row, Sample, tar_parts


def write_tar(samples: Iterable[Sample]) -> tuple[bytes, list[Row]]:
    """Return a whole tar, and where it holds which of the samples."""
    rows: list[Row] = []
    return b"".join(tar_parts(samples, rows)), rows


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file, by its name below the folder."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
