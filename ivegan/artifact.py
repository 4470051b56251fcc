"""What makes a folder of model files trustworthy: checksums of all of them, and no pickle in any.

A pickle runs code when it is loaded. ``find_pickles`` looks for them by content as well as by name,
in files and in archives within files; it loads nothing.
"""

import hashlib
import io
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ivegan.errors import UserError

SUMS = "SHA256SUMS"
"""Name of the file of checksums, as ``sha256sum --check`` reads it."""

_PICKLED = {".pkl", ".pickle", ".pt", ".pth", ".joblib", ".dill"}


def write_sums(folder: Path) -> str:
    """Return the sha256 of the list of checksums, after writing it for every file in the folder."""
    names = sorted(n for n in _names(folder) if n != SUMS)
    (folder / SUMS).write_text("".join(f"{_sha256(folder / n)}  {n}\n" for n in names))
    return _sha256(folder / SUMS)


def check_sums(folder: Path, expected: str, *, ignore: frozenset[str] = frozenset()) -> None:
    """Do nothing if the folder holds exactly the files that ``write_sums`` saw.

    Args:
        folder: what was fetched.
        expected: what ``write_sums`` returned, kept elsewhere than the files.
        ignore: files that may stand there besides.

    Raises:
        UserError: names the files that differ, are missing or should not be there.
    """
    listed = folder / SUMS
    if not listed.is_file() or _sha256(listed) != expected:
        raise UserError(
            f"The checksums in {folder} are not those that were registered ({expected[:12]}…): do "
            "not load these files, and ask where they were changed."
        )
    lines = [line.split("  ", 1) for line in listed.read_text().splitlines()]
    sums = {name: digest for digest, name in lines}
    found = set(_names(folder)) - {SUMS} - ignore
    wrong = sorted(found ^ sums.keys())
    wrong += sorted(name for name in found & sums.keys() if _sha256(folder / name) != sums[name])
    if wrong:
        raise UserError(
            f"Not as they were registered: {', '.join(wrong)} in {folder}; do not load these "
            "files, and ask where they were changed."
        )


def find_pickles(path: Path) -> list[str]:
    """Return where pickles are below a path: ``data/model.pt2!inner/data.pkl`` for nested ones."""
    files = [path / name for name in _names(path)] if path.is_dir() else [path]
    root = path if path.is_dir() else path.parent
    return [
        found
        for file in files
        for found in _pickles(file.read_bytes(), str(file.relative_to(root)))
    ]


def empty_members(archive: Path, folder: str) -> None:
    """Replace by nothing the content of all members of an archive that lie in a folder."""
    fresh = archive.with_suffix(".fresh")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(fresh, "w") as new:
        for member in old.infolist():
            held = folder in PurePosixPath(member.filename).parts[:-1]
            new.writestr(member, b"" if held else old.read(member))
    fresh.replace(archive)


def _pickles(data: bytes, name: str) -> Iterator[str]:
    if not data:
        return
    if zipfile.is_zipfile(io.BytesIO(data)):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                for member in archive.infolist():
                    yield from _pickles(archive.read(member), f"{name}!{member.filename}")
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError):
            yield name  # broken or encrypted: nobody can tell
        return
    if PurePosixPath(name).suffix in _PICKLED or _is_pickle(data):
        yield name


def _is_pickle(data: bytes) -> bool:
    """Return whether the bytes begin with a binary pickle, or are one of the old text kind."""
    binary = data[0] == 0x80 and data[1:2] in (b"\2", b"\3", b"\4", b"\5")
    if not binary and not data.rstrip().endswith(b"."):
        return False
    try:
        if binary:
            return any(code.name == "STOP" for code, _, _ in pickletools.genops(data))
        stream = io.BytesIO(data)
        pickletools.dis(stream, out=io.StringIO())  # also checks the stack that the text implies
        return not stream.read().strip()
    except (ValueError, IndexError, KeyError, EOFError, UnicodeDecodeError):
        return False


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
