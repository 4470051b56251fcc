"""Small data sets that tests write, and all files of a folder."""

from collections.abc import Sequence
from pathlib import Path

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
