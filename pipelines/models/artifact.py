"""What makes a folder of model files trustworthy: checksums of all of them, and no pickle in any.

A pickle runs code when it is loaded. ``find_pickles`` looks for them by content as well as by name,
in files and in archives within files (zip, tar, gzip, bzip2, xz); it loads nothing.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import pickletools
import re
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ivegan.errors import UserError

SUMS = "SHA256SUMS"
"""Name of the file of checksums, as ``sha256sum --check`` reads it."""

_COMPRESSED = {b"\x1f\x8b\x08": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_UNREADABLE = (
    *(zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, OSError, EOFError),
    *(NotImplementedError, RuntimeError, ValueError),
)
_ENDS = {"STOP", "REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}  # all but the first call something
_STORES = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_TYPICAL = {"PROTO", "GLOBAL", "INST", "STACK_GLOBAL", "PUT 0", "BINPUT 0"}
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in what is perhaps no pickle's text
        return [
            found
            for file in files
            for data in (file.read_bytes(),)
            for found in _pickles(data, str(file.relative_to(root)), _allowance(data))
        ]


def empty_members(archive: Path, folder: str) -> None:
    """Replace by nothing the content of all members of an archive that lie in a folder."""
    fresh = archive.with_suffix(".fresh")
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(fresh, "w") as new:
        for member in old.infolist():
            held = folder in PurePosixPath(member.filename).parts[:-1]
            new.writestr(member, b"" if held else old.read(member))
    fresh.replace(archive)


@dataclass
class _Allowance:
    """How many bytes may still come out of the archives of one file."""

    left: int

    def take(self, read: Callable[[int], bytes]) -> bytes:
        data = read(self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("more comes out of it than of any model")
        return data


def _allowance(data: bytes) -> _Allowance:
    return _Allowance((64 << 20) + 4 * len(data))  # an archive within one takes its bytes twice


def _pickles(data: bytes, name: str, allowance: _Allowance) -> Iterator[str]:
    if _is_pickle(data) or _is_object_array(data):
        yield name
        return
    is_archive = False
    try:
        for inner, content in _members(data, allowance):
            is_archive = True
            yield from _pickles(content, f"{name}!{inner}", allowance)
    except _UNREADABLE:
        yield name  # broken, encrypted or a bomb: nobody can tell
        return
    if data and not is_archive and PurePosixPath(name).suffix in _PICKLED:
        yield name


def _members(data: bytes, allowance: _Allowance) -> Iterator[tuple[str, bytes]]:
    """Yield what an archive holds; bytes that are archives of two kinds are read as both."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                with archive.open(member) as stream:
                    yield member.filename, allowance.take(stream.read)
    if not data.startswith(tuple(_COMPRESSED)) and tarfile.is_tarfile(io.BytesIO(data)):
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                if (stream := archive.extractfile(member)) is not None:
                    yield member.name, allowance.take(stream.read)
    for magic, unpacked in _COMPRESSED.items():
        if data.startswith(magic):
            with unpacked(io.BytesIO(data)) as stream:
                yield "content", allowance.take(stream.read)


def _is_object_array(data: bytes) -> bool:
    """Return whether the bytes are a ``.npy`` of objects, whose values are a pickle."""
    if not data.startswith(np.lib.format.MAGIC_PREFIX):
        return False
    stream = io.BytesIO(data)
    try:
        old = np.lib.format.read_magic(stream) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        return read(stream)[2].hasobject
    except ValueError:
        return True  # nobody can tell


def _is_pickle(data: bytes) -> bool:
    """Return whether an unpickler would get through the bytes to their end or to a call.

    What stands behind that is of no concern: it would be too late. But weights and text can look
    like a few instructions by chance: those count only in a stream that begins with its protocol,
    that imports or numbers something, as those do that Python writes, or that ends with them.
    """
    stack: list[bool] = []  # the unpickler's; True is a mark
    seen: set[str] = set()
    try:
        for code, arg, at in pickletools.genops(data):
            before = code.stack_before
            takes = len(before)
            if pickletools.markobject in before or (code.name == "POP" and stack[-1:] == [True]):
                while not stack.pop():
                    pass
                takes = before.index(pickletools.markobject) if code.name != "POP" else 0
            taken = [stack.pop() for _ in range(takes)]
            if any(taken) or ("GET" in code.name and not seen & _STORES):
                return False
            if code.name in ("GLOBAL", "INST") and not re.fullmatch(r"[\w.]+ [\w.]+", str(arg)):
                return False
            seen |= {code.name, f"{code.name} 0"} if arg == 0 else {code.name}
            if code.name in _ENDS:
                return bool(seen & _TYPICAL) or not data[(at or 0) + 1 :].strip()
            stack += [left is pickletools.markobject for left in code.stack_after]
    except (ValueError, IndexError, KeyError, EOFError):  # an unpickler would have failed too
        return False
    return False


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
