"""The manifest of a data set: its shards, their digests and how they were prepared.

OUT/train/shard-00000.tar …    entries KEY.npy (image, c h w) and KEY.json (label or attributes)
OUT/samples.parquet            a row per sample: key, split, labels, source, shard, offset
OUT/contact-train.png …        some images of each split, to look at
OUT/manifest.json              written last: without it there is no data set
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from ivegan import storage
from ivegan.digest import sha256_hex
from ivegan.errors import UserError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
ENCODING = {"format": "npy", "dtype": "uint8"}
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar as the manifest describes it."""

    split: str
    key: str
    """Name below the data set's folder, ``train/shard-00000.tar``."""
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of a data set, down to each shard's digest."""

    dataset: str
    image_shape: tuple[int, int, int]
    """Channels, height, width."""
    splits: dict[str, int]
    """Samples per split."""
    shards: tuple[Shard, ...]
    """Split by split, in the order of their numbers."""
    sources: dict[str, str]
    """Raw files: name -> sha256."""
    settings: dict[str, Any]
    """All settings of the preparation."""
    settings_hash: str
    """``ivegan.digest.digest`` of the settings."""
    label_names: tuple[str, ...] = ()
    """Classes by label, or attributes by column."""
    extras: dict[str, str] = field(default_factory=dict)
    """Table and contact sheets: name -> sha256."""
    schema_version: int = SCHEMA_VERSION

    @property
    def hash(self) -> str:
        """Return the sha256 of the manifest file: the data set's identity."""
        return sha256_hex(to_json(self))

    def of_split(self, split: str) -> list[Shard]:
        """Return the shards of one split."""
        return [shard for shard in self.shards if shard.split == split]


def shard_key(split: str, number: int) -> str:
    """Return a shard's name below the data set's folder."""
    return f"{split}/shard-{number:05d}.tar"


def to_json(manifest: Manifest) -> bytes:
    """Return the content of the manifest file."""
    return (json.dumps(dataclasses.asdict(manifest), sort_keys=True, indent=1) + "\n").encode()


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Write the manifest of the data set at the URI."""
    storage.write_bytes(storage.join(uri, MANIFEST), to_json(manifest))


def read_manifest(uri: str) -> Manifest:
    """Return the manifest of the data set at the URI.

    Raises:
        UserError: the manifest is missing, damaged, or of another version.
    """
    manifest_uri = storage.join(uri, MANIFEST)
    if not storage.exists(manifest_uri):
        raise UserError(f"There is no data set at {uri}: build it with data_prep/build.py.")
    try:
        values = json.loads(storage.read_bytes(manifest_uri))
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{manifest_uri} has schema version {version}, but this program reads version "
                f"{SCHEMA_VERSION}: build the data set again."
            )
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        channels, height, width = values.pop("image_shape")
        names = tuple(values.pop("label_names"))
        manifest = Manifest(
            **values, shards=shards, image_shape=(channels, height, width), label_names=names
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{manifest_uri} is damaged ({error}): build the data set again."
        ) from error
    if not manifest.shards or not any(manifest.splits.values()):
        raise UserError(f"The data set at {uri} is empty: build it from a source with images.")
    return manifest


def read_split_manifest(data_uri: str, split: str) -> Manifest:
    """Return the manifest of a data set after checking that it has the split.

    Raises:
        UserError: no such data set or split.
    """
    manifest = read_manifest(data_uri)
    if not manifest.splits.get(split):
        names = ", ".join(name for name, count in manifest.splits.items() if count)
        raise UserError(f"The data set at {data_uri} has no split {split!r}; it has {names}.")
    return manifest
