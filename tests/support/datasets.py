"""Small data sets that tests write, all files of a folder, and a server of them."""

import functools
import http.server
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ivegan.data.manifest import Manifest, Shard, shard_key, write_manifest
from ivegan.data.tars import Sample, write_tar
from ivegan.storage.digest import digest, sha256_hex


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file, by its name below the folder."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def write_dataset(folder: Path, shards: Sequence[Sequence[Sample]]) -> str:
    """Write a data set of one split, train, shard by shard, and return its URI."""
    entries, (channels, height, width) = [], shards[0][0].image.shape
    (folder / "train").mkdir(parents=True)
    for number, samples in enumerate(shards):
        raw, _ = write_tar(samples)
        key, sha256 = shard_key("train", number), sha256_hex(raw)
        (folder / key).write_bytes(raw)
        size = {"samples": len(samples), "bytes": len(raw)}
        entries.append(Shard(split="train", key=key, sha256=sha256, **size))
    manifest = Manifest(
        dataset="made",
        image_shape=(channels, height, width),
        splits={"train": sum(entry.samples for entry in entries)},
        shards=tuple(entries),
        sources={},
        settings={},
        settings_hash=digest({}),
    )
    write_manifest(str(folder), manifest)
    return str(folder)


class Mirror(http.server.ThreadingHTTPServer):
    """A server of the files in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Answers, directory=str(folder)))
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()


class _Answers(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        cast(Mirror, self.server).asked.append(self.path.removeprefix("/"))
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass
