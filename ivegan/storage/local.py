"""Files and folders of this machine, which appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to, which replaces the file at the path when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before the content
            file.close()
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def create(path: Path, data: bytes) -> None:
    """Write a file whole, unless there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        fresh = Path(beside) / path.name
        fresh.write_bytes(data)
        try:
            path.hardlink_to(fresh)
        except OSError:
            if not path.exists():  # a file system without hard links, such as FAT
                fresh.replace(path)


def files(folder: Path) -> list[Path]:
    """Return all files below a folder, sorted; other processes may delete some meanwhile."""

    def check(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    walked = os.walk(folder, onerror=check)
    found = (Path(root, name) for root, _, names in walked for name in names)
    return sorted(path for path in found if path.is_file())


def sizes(folder: Path) -> dict[str, int]:
    """Return all files below a folder: relative name -> bytes."""
    found = {}
    for path in files(folder):
        with contextlib.suppress(FileNotFoundError):  # a temporary file of another process
            found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return found


def replace_folder(source: Path, target: Path) -> None:
    """Copy beside the target and rename, so that a reader sees a whole folder or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        fresh = Path(beside) / "new"
        fresh.mkdir()
        for path in files(source):  # copytree would collect errors without their errno
            copy = fresh / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            with copy.open("rb") as file:
                os.fsync(file.fileno())
        if target.exists():
            target.rename(Path(beside) / "old")
        fresh.rename(target)


def delete_folder(folder: Path) -> None:
    """Delete a folder, which disappears by one renaming."""
    if folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            folder.rename(Path(beside) / folder.name)
