"""Turn a raw data set into shards and a manifest.

Each shard is one Ray task, or one turn of a plain loop with ``--workers 0``; the bytes are the
same. The manifest is written last, so what was interrupted is no data set; run again, the command
goes on with the shards that are missing, and does nothing where all is done.

    python data_prep/build.py digits --out runs/data/digits --workers 0
    python data_prep/build.py mnist --source ~/mnist --out s3://bucket/mnist --workers 4

The first ends with 1797 samples in 4 shards.
"""

import dataclasses
import hashlib
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from data_prep import celeba, digits, mnist
from data_prep.source import Source
from ivegan import cli, storage
from ivegan.errors import UserError
from ivegan.shards import (
    ENCODING,
    MANIFEST,
    Manifest,
    Shard,
    read_manifest,
    settings_hash,
    shard_key,
    write_manifest,
    write_tar,
)

log = logging.getLogger(__name__)

DATASETS: dict[str, ModuleType] = {"digits": digits, "mnist": mnist, "celeba": celeba}
_UNFINISHED = ".unfinished-"  # folder with a record of each shard, until the manifest is there


@dataclass(frozen=True, kw_only=True)
class Build(cli.Options):
    """Turn a raw data set into shards and a manifest. Run again, it goes on, or does nothing."""

    dataset: Literal["digits", "mnist", "celeba"]
    """digits, mnist or celeba. mnist takes any data set of four IDX files."""
    source: str | None = None
    """Folder or s3:// URI of the raw files; digits need none."""
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


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to write."""

    dataset: str
    source: str | None
    out: str
    options: dict[str, Any]
    split: str
    number: int
    start: int
    stop: int
    record: str
    """Where the finished shard is noted."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is decided before the first shard is written."""

    about: Source
    out: str
    settings: dict[str, Any]
    jobs: tuple[Job, ...]
    records: str
    """Folder of the records, which carries the hash of this plan."""


def build(
    dataset: str,
    source: str | None,
    out: str,
    workers: int = 0,
    *,
    shard_size: int = 1000,
    name: str | None = None,
    crop: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Build the data set at ``out`` and return what was done.

    Args:
        dataset: a key of ``DATASETS``.
        source: folder or URI of the raw files.
        out: folder or URI of the data set.
        workers: shards written at a time by Ray tasks; 0 is a plain loop in this process.
        shard_size: samples per shard.
        name: name in the manifest.
        crop: see ``celeba``.
        limit: see ``celeba``.

    Returns:
        manifest (its URI), shards, samples, bytes, skipped (shards that were there already) and
        seconds.

    Raises:
        UserError: the source is not what it should be, or ``out`` holds something else.
    """
    began = time.perf_counter()
    plan = make_plan(dataset, source, out, shard_size=shard_size, name=name, crop=crop, limit=limit)
    manifest = _standing(plan)
    skipped = len(plan.jobs)
    if manifest is None:
        finished = _finished(plan)
        missing = [job for job in plan.jobs if shard_key(job.split, job.number) not in finished]
        skipped = len(finished)
        if workers == 0:
            written: Iterable[Shard] = map(write_shard, missing)
        else:
            written = _written_by_ray(missing, workers)
        for shard in _shown(written, len(missing)):
            finished[shard.key] = shard
        manifest = _complete(plan, finished)
    return {
        "manifest": storage.join(plan.out, MANIFEST),
        "shards": len(manifest.shards),
        "samples": sum(manifest.splits.values()),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "skipped": skipped,
        "seconds": round(time.perf_counter() - began, 3),
    }


def make_plan(
    dataset: str,
    source: str | None,
    out: str,
    *,
    shard_size: int = 1000,
    name: str | None = None,
    crop: str | None = None,
    limit: int | None = None,
) -> Plan:
    """Return what ``build`` would write, after looking through the source.

    Raises:
        UserError: as for ``build``.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size is {shard_size}, but must be at least 1.")
    module = DATASETS[dataset]
    options = {key: value for key, value in (("crop", crop), ("limit", limit)) if value is not None}
    for key in options:
        if key not in module.OPTIONS:
            raise UserError(f"--{key} means nothing for {dataset}: leave it out.")
    if source is not None:
        source = storage.absolute(source)
    out = storage.absolute(out)
    about: Source = module.describe(source, name or dataset, **options)
    if not any(about.splits.values()):
        raise UserError(f"There are no images in {source}: nothing to build.")
    settings = {**about.settings, "shard_size": shard_size, "encoding": ENCODING}
    identity = json.dumps([about.dataset, about.sources, settings], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()
    records = storage.join(out, _UNFINISHED + digest[:16])
    jobs = [
        Job(
            dataset=dataset,
            source=source,
            out=out,
            options=options,
            split=split,
            number=number,
            start=start,
            stop=min(start + shard_size, total),
            record=storage.join(records, f"{split}-{number:05d}.json"),
        )
        for split, total in about.splits.items()
        for number, start in enumerate(range(0, total, shard_size))
    ]
    return Plan(about=about, out=out, settings=settings, jobs=tuple(jobs), records=records)


def write_shard(job: Job) -> Shard:
    """Write one shard, note it as finished, and return its entry of the manifest."""
    key = shard_key(job.split, job.number)
    samples = DATASETS[job.dataset].read(job.source, job.split, job.start, job.stop, **job.options)
    data = write_tar(samples)
    storage.write_bytes(storage.join(job.out, key), data)
    shard = Shard(
        split=job.split,
        key=key,
        samples=job.stop - job.start,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    storage.write_bytes(job.record, json.dumps(dataclasses.asdict(shard)).encode())
    return shard


def main(options: Build) -> dict[str, Any]:
    """Build, or tell the plan, and return the JSON object."""
    if options.out is None:
        raise UserError("build.py needs --out, a folder or s3:// URI for the data set.")
    if options.workers < 0:
        raise UserError(f"--workers is {options.workers}, but must be 0 or more.")
    choice: dict[str, Any] = {
        "shard_size": options.shard_size,
        "name": options.name,
        "crop": options.crop,
        "limit": options.limit,
    }
    if options.dry_run:
        plan = make_plan(options.dataset, options.source, options.out, **choice)
        told = {
            "dataset": plan.about.dataset,
            "source": options.source,
            "out": plan.out,
            "workers": options.workers,
            "splits": plan.about.splits,
            "image_shape": plan.about.image_shape,
            "shards": len(plan.jobs),
            "settings": plan.settings,
            "already_built": _standing(plan) is not None,
        }
        for key, value in told.items():
            print(f"{key:14} {value}")
        return told
    result = build(options.dataset, options.source, options.out, options.workers, **choice)
    print(
        f"{result['samples']} samples in {result['shards']} shards, {result['bytes']:,} bytes, "
        f"{result['skipped']} shards were there already: {result['manifest']}"
    )
    return result


def command() -> None:
    """Run as a program."""
    cli.run(main, Build)


def _standing(plan: Plan) -> Manifest | None:
    """Return the manifest at ``out`` if it is of this plan, and None if there is none.

    Raises:
        UserError: something else is there.
    """
    advice = "choose another --out, or delete what is there"
    if storage.exists(storage.join(plan.out, MANIFEST)):
        manifest = read_manifest(plan.out)
        about = plan.about
        if manifest.settings_hash != settings_hash(plan.settings):
            raise UserError(
                f"{plan.out} holds {manifest.dataset} built with other settings: {advice}."
            )
        if (manifest.dataset, manifest.sources) != (about.dataset, about.sources):
            raise UserError(
                f"{plan.out} holds {manifest.dataset} built from other files: {advice}."
            )
        return manifest
    ours = plan.records.rpartition("/")[2]
    for found in storage.list_names(plan.out):
        if found.startswith(_UNFINISHED) and found != ours:
            raise UserError(
                f"{plan.out} holds an unfinished build with other settings or files: {advice}."
            )
    return None


def _finished(plan: Plan) -> dict[str, Shard]:
    """Return the shards that an earlier, interrupted run has written: key -> entry."""
    out: dict[str, Shard] = {}
    names = storage.list_names(plan.records)
    sizes = storage.list_files(plan.out) if names else {}
    for name in names:
        if not name.endswith(".json") or name.startswith("."):
            continue  # a record that was being written when the run was killed
        shard = Shard(**json.loads(storage.read_bytes(storage.join(plan.records, name))))
        if sizes.get(shard.key) == shard.bytes:
            out[shard.key] = shard
    return out


def _complete(plan: Plan, finished: dict[str, Shard]) -> Manifest:
    """Write the manifest and return it.

    Raises:
        UserError: a shard that another node has written cannot be seen from here.
    """
    sizes = storage.list_files(plan.out)
    shards = [finished[shard_key(job.split, job.number)] for job in plan.jobs]
    for shard in shards:
        if sizes.get(shard.key) != shard.bytes:
            raise UserError(
                f"{plan.out} has no {shard.key}, though a worker wrote it: on several nodes --out "
                "must be a place that all of them share, such as an s3:// URI."
            )
    manifest = Manifest(
        dataset=plan.about.dataset,
        image_shape=plan.about.image_shape,
        splits=plan.about.splits,
        shards=tuple(shards),
        sources=plan.about.sources,
        settings=plan.settings,
        settings_hash=settings_hash(plan.settings),
        label_names=plan.about.label_names,
    )
    # The records go first: a data set never has anything beside what its manifest names.
    storage.delete_folder(plan.records)
    if storage.is_local(plan.out):
        for name in sizes:
            if Path(name).name.startswith(".shard-"):  # half written when a run was killed
                (Path(plan.out) / name).unlink()
    write_manifest(plan.out, manifest)
    return manifest


def _written_by_ray(jobs: list[Job], workers: int) -> Iterator[Shard]:
    """Yield the shards as Ray tasks finish them, so many at a time.

    Raises:
        UserError: what a task found wrong with the source or the destination.
    """
    import ray
    from ray.exceptions import RayTaskError

    started = not ray.is_initialized()
    if started:
        # Where no cluster is named, one is started for as long as this takes.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        attach = bool(os.environ.get("RAY_ADDRESS"))
        _check_ray_address()
        ray.init(
            address=None if attach else "local",
            num_cpus=None if attach else workers,
            include_dashboard=None if attach else False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    try:
        where = {"env_vars": storage.environment()}
        task = ray.remote(num_cpus=1, runtime_env=where)(write_shard)
        waiting, running = list(reversed(jobs)), []
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(task.remote(waiting.pop()))
            done, running = ray.wait(running)
            yield ray.get(done[0])
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    finally:
        if started:
            ray.shutdown()


def _check_ray_address() -> None:
    """Raise a UserError if RAY_ADDRESS names a host that does not answer: Ray would try forever."""
    address = os.environ.get("RAY_ADDRESS", "").removeprefix("ray://")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"No Ray cluster answers at RAY_ADDRESS {address} ({error}): correct or unset it."
            ) from error


def _shown(shards: Iterable[Shard], total: int) -> Iterator[Shard]:
    """Yield the shards, with a bar where somebody watches and some lines where nobody does."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(shards, total=total, unit="shard")
        return
    for done, shard in enumerate(shards, start=1):
        if done * 10 // total > (done - 1) * 10 // total:
            log.info("%d of %d shards written", done, total)
        yield shard


if __name__ == "__main__":
    from data_prep.build import command as run_command  # so that tasks are found by module name

    run_command()
