"""Files and folders of this machine, which appear whole or not at all."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator, Mapping
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


def sizes(folder: Path) -> dict[str, int]:
    """Return all files below a folder: relative name -> bytes; some may be deleted meanwhile."""

    def check(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found = {}
    for root, _, names in os.walk(folder, onerror=check):
        for path in (Path(root, name) for name in names):
            with contextlib.suppress(FileNotFoundError):  # a temporary file of another process
                found[path.relative_to(folder).as_posix()] = path.stat().st_size
    return dict(sorted(found.items()))


def replace_folder(files: Mapping[str, bytes], target: Path) -> None:
    """Write a folder beside the target and rename it, so that a reader sees a whole one or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        for name, data in files.items():
            with new_file(Path(beside, "new", name)) as file:
                file.write(data)
        if target.exists():
            target.rename(Path(beside, "old"))
        Path(beside, "new").rename(target)


def delete_folder(folder: Path) -> None:
    """Delete a folder, which disappears by one renaming."""
    if folder.is_dir():
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            folder.rename(Path(beside) / folder.name)


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that ends with the process; yield whether it is held."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
