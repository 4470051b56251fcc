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
from ivegan.errors import UserError
from ivegan.storage.digest import sha256_hex
from ivegan.storage.schema import check, inside, parse_json

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
ENCODING = {"format": "npy", "dtype": "uint8"}
SPLITS = ("train", "valid", "test")
_REMEDY = "delete it and build the data set again"


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
    """``ivegan.storage.digest.digest`` of the settings."""
    label_names: tuple[str, ...] = ()
    """Classes by label, or attributes by column."""
    extras: dict[str, str] = field(default_factory=dict)
    """Table and contact sheets: name -> sha256."""
    schema_version: int = SCHEMA_VERSION

    @property
    def hash(self) -> str:
        """Return the sha256 of the manifest file: the data set's identity."""
        return sha256_hex(to_json(self))

    def __post_init__(self) -> None:
        counts = dict.fromkeys(self.splits, 0)
        for shard in self.shards:
            inside(shard.key)
            if shard.split not in counts or min(shard.samples, shard.bytes) < 0:
                raise ValueError(f"the shard {shard.key} has no split or a negative size")
            counts[shard.split] += shard.samples
        if counts != self.splits:
            raise ValueError(f"the shards hold {counts} samples, but splits are {self.splits}")
        for name in self.extras:
            inside(name)
        if min(self.image_shape) < 1:
            raise ValueError(f"image_shape is {self.image_shape}")

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
    content = storage.read_bytes(manifest_uri)
    values = parse_json(content, manifest_uri, _REMEDY)
    version = values.get("schema_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise UserError(
            f"{manifest_uri} has schema version {version}, but this program reads version "
            f"{SCHEMA_VERSION}: {_REMEDY}."
        )
    return check(values, Manifest, manifest_uri, _REMEDY)


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
