"""Read a data set back and name everything that is not as its manifest says.

    python data_prep/verify.py runs/data/digits

ends with status 0 and "OK: 1797 samples in 4 shards"; status 1 means that something is wrong.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ivegan import storage
from ivegan.data.manifest import MANIFEST, read_manifest
from ivegan.data.tars import read_shard
from ivegan.storage.digest import digest, sha256_hex
from ivegan.storage.schema import DamagedError
from pipelines import options as cli


@dataclass(frozen=True, kw_only=True)
class Verify(cli.Options):
    """Read every shard back against the manifest; exit status 1 if anything is wrong."""

    uri: str
    """Folder or s3:// URI of the data set."""


def verify(uri: str) -> list[str]:
    """Return one sentence for each thing that is wrong; none means that all is well.

    Raises:
        UserError: there is no readable manifest at the URI.
    """
    uri = storage.absolute(uri)
    manifest = read_manifest(uri)
    wrong = []
    if digest(manifest.settings) != manifest.settings_hash:
        wrong.append(f"{MANIFEST} holds settings of another hash than it says.")
    present = storage.list_files(uri)
    named = {shard.key for shard in manifest.shards}
    wrong += [
        f"{name} does not belong to the data set."
        for name in sorted(present.keys() - named - {MANIFEST} - manifest.extras.keys())
    ]
    for name, expected in manifest.extras.items():
        if name not in present:
            wrong.append(f"{name} is missing.")
            continue
        try:
            if sha256_hex(storage.read_bytes(storage.join(uri, name))) != expected:
                wrong.append(f"{name} has another sha256 than the manifest says.")
        except DamagedError as error:
            wrong.append(str(error))
    keys: Counter[str] = Counter()
    for shard in manifest.shards:
        if shard.key not in present:
            wrong.append(f"{shard.key} is missing.")
            continue
        try:
            samples = read_shard(uri, shard, manifest.image_shape)
            keys.update(sample.key for sample in samples)
        except DamagedError as error:
            wrong.append(str(error))
    repeated = [key for key, count in keys.items() if count > 1]
    if repeated:
        wrong.append(f"{len(repeated)} keys stand in the data set twice, {repeated[0]!r} is one.")
    return wrong


def main(options: Verify) -> dict[str, Any]:
    """Verify, or print the plan, and return the JSON object."""
    manifest = read_manifest(storage.absolute(options.uri))
    summary = {
        "manifest": storage.join(storage.absolute(options.uri), MANIFEST),
        "shards": len(manifest.shards),
        "samples": sum(manifest.splits.values()),
        "bytes": sum(shard.bytes for shard in manifest.shards),
    }
    if options.dry_run:
        for key, value in summary.items():
            print(f"{key:10} {value}")
        return summary | {"wrong": []}
    with storage.longer_retries():
        wrong = verify(options.uri)
    for line in wrong:
        print(line)
    if not wrong:
        print(f"OK: {summary['samples']} samples in {summary['shards']} shards")
    return summary | {"wrong": wrong}


def command() -> None:
    """Run as a program."""
    cli.run(main, Verify, failed=lambda result: bool(result["wrong"]))


if __name__ == "__main__":
    command()
