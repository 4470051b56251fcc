"""Build shards and a manifest from a raw data set, with a table and pictures for people.

Run again, the command writes the shards that are missing, or does nothing if all exist.

    python data_prep/build.py digits --out runs/data/digits --workers 0
    python data_prep/build.py mnist --source ~/mnist --out s3://bucket/mnist --workers 4

The first ends with 1797 samples in 4 shards.
"""

from dataclasses import dataclass
from typing import Any, Literal

from data_prep import mnist
from data_prep.building import build, existing_manifest, make_plan
from ivegan import storage
from ivegan.errors import UserError, public
from pipelines import options as cli


@dataclass(frozen=True, kw_only=True)
class Build(cli.Options):
    """Turn a raw data set into shards and a manifest. Repeated, it writes only what is missing."""

    dataset: Literal["digits", "mnist", "celeba"]
    """digits, mnist or celeba. mnist takes any data set of four IDX files."""
    source: str | None = None
    """Folder or s3:// URI of the raw files; digits need none. For mnist also "download", or the
    http(s):// URL of a mirror; the files are then kept in OUT-raw."""
    out: str | None = None
    """Folder or s3:// URI for the data set."""
    workers: int = 2
    """Shards written at a time, as Ray tasks; 0 is a plain loop without Ray."""
    name: str | None = None
    """Name of the data set in the manifest, where it is not DATASET."""
    shard_size: int = 1000
    """Samples per shard."""
    crop: Literal["c128", "c178r128"] | None = None
    """celeba: the central 128 pixels (c128, the default), or the central 178 resized to 128."""
    limit: int | None = None
    """celeba: at most so many images of each split, for a small build."""


def main(options: Build) -> dict[str, Any]:
    """Build, or print the plan, and return the JSON object."""
    if options.out is None:
        raise UserError("build.py needs --out, a folder or s3:// URI for the data set.")
    options.at_least(workers=0)
    dataset, source, out = options.dataset, options.source, options.out
    choices: dict[str, Any] = {
        "shard_size": options.shard_size,
        "name": options.name,
        "crop": options.crop,
        "limit": options.limit,
    }
    if not options.dry_run:
        result = build(dataset, source, out, options.workers, **choices)
        print(
            f"{result['samples']} samples in {result['shards']} shards, {result['bytes']:,} bytes, "
            f"{result['skipped']} shards existed already: {result['manifest']}"
        )
        return result
    raw_uri = source
    if dataset == "mnist" and source is not None and mnist.is_remote(source):
        raw_uri = mnist.raw_uri(out)
        if not storage.exists(raw_uri):
            print(f"{public(source)} would first be downloaded to {raw_uri}")
            return {"source": public(source), "out": storage.absolute(out)}
    plan = make_plan(dataset, raw_uri, out, **choices)
    summary = {
        "dataset": plan.raw.dataset,
        "source": source and public(source),
        "out": plan.out,
        "workers": options.workers,
        "splits": plan.raw.splits,
        "image_shape": plan.raw.image_shape,
        "shards": len(plan.jobs),
        "settings": plan.settings,
        "already_built": existing_manifest(plan) is not None,
    }
    for key, value in summary.items():
        print(f"{key:14} {value}")
    return summary


def command() -> None:
    """Run as a program."""
    cli.run(main, Build)


if __name__ == "__main__":
    command()
