"""All files of a data set's folder."""

from pathlib import Path


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file, by its name below the folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
