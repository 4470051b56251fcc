"""Shards, table, contact sheets and manifest of a data set, from its raw files.

Each shard is one Ray task, or one turn of a plain loop with no workers; the bytes are the same. The
manifest is written last, so an interrupted build is no data set; run again, it writes the missing
shards. Two builds of the same data into one place write the same bytes and may run at once; a build
with other settings is refused.
"""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from data_prep import celeba, digits, mnist
from data_prep.products import Written, contact_sheets, table
from data_prep.source import Source
from data_prep.tasks import with_progress, write_with_ray
from ivegan import storage
from ivegan.data.manifest import (
    ENCODING,
    MANIFEST,
    SAMPLES,
    Manifest,
    Shard,
    read_manifest,
    shard_key,
    write_manifest,
)
from ivegan.data.tars import write_tar
from ivegan.errors import UserError
from ivegan.storage.digest import digest, sha256_hex
from ivegan.storage.schema import DamagedError, read

log = logging.getLogger(__name__)

DATASETS: dict[str, ModuleType] = {"digits": digits, "mnist": mnist, "celeba": celeba}
_ADVICE = "choose another --out, or delete the existing files"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One shard to write: the samples of a split from start to stop."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def key(self) -> str:
        """Name of the shard below the data set's folder."""
        return shard_key(self.split, self.number)


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """All that is decided before the first shard is written."""

    dataset: str
    source: str | None
    out: str
    options: dict[str, Any]
    """Of the data set's module."""
    raw: Source
    settings: dict[str, Any]
    jobs: tuple[Job, ...]

    @property
    def identity(self) -> bytes:
        """Return what another build must agree with to write into the same place."""
        raw = self.raw
        what = {"dataset": raw.dataset, "sources": raw.sources, "settings": self.settings}
        return (json.dumps(what, sort_keys=True, indent=1) + "\n").encode()

    @property
    def records(self) -> str:
        """Folder of the plan and a record of each finished shard, until all is done."""
        return storage.join(self.out, ".unfinished")

    @property
    def marker(self) -> str:
        """Return where the identity is while a build is unfinished."""
        return storage.join(self.records, "plan.json")

    def record(self, job: Job) -> str:
        """Return where a finished shard is recorded."""
        return storage.join(self.records, f"{job.split}-{job.number:05d}.json")


def build(
    dataset: str, source: str | None, out: str, workers: int = 0, **choices: Any
) -> dict[str, Any]:
    """Build the data set at ``out`` and return what was done.

    Args:
        dataset: a key of ``DATASETS``.
        source: folder or URI of the raw files; mnist also takes what ``mnist.fetched`` does.
        out: folder or URI of the data set.
        workers: shards written at a time by Ray tasks; 0 is a plain loop in this process.
        choices: as for ``make_plan``.

    Returns:
        manifest (its URI), shards, samples, bytes, skipped (shards that existed already) and
        seconds.

    Raises:
        UserError: the source is not what it should be, or ``out`` holds something else.
    """
    began = time.perf_counter()
    if dataset == "mnist" and source is not None:
        source = mnist.fetched(source, out)
    plan = make_plan(dataset, source, out, **choices)
    manifest = existing_manifest(plan)
    if manifest is not None:
        with storage.longer_retries():
            skipped = len(plan.jobs) - _write_lost(plan, manifest)
    else:
        try:
            with storage.longer_retries():
                manifest, skipped = _write(plan, workers)
        except UserError:
            # An equal build that ended first has cleared away the records this one needed.
            manifest, skipped = existing_manifest(plan), len(plan.jobs)
            if manifest is None:
                raise
    # Also what a run has left that was killed right after it wrote the manifest.
    storage.delete_folder(plan.records)
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
) -> BuildPlan:
    """Return what ``build`` would write, after looking through the source.

    The settings are those that ``Build`` in ``data_prep/build.py`` explains.

    Raises:
        UserError: as for ``build``.
    """
    if shard_size < 1:
        raise UserError(f"--shard-size is {shard_size}, but must be at least 1.")
    module = DATASETS[dataset]
    given: dict[str, Any] = {"crop": crop, "limit": limit}
    options = {key: value for key, value in given.items() if value is not None}
    for key in options:
        if key not in module.OPTIONS:
            raise UserError(f"--{key} means nothing for {dataset}: leave it out.")
    if source is not None:
        source = storage.absolute(source)
    out = storage.absolute(out)
    raw: Source = module.describe(source, name or dataset, **options)
    if not any(raw.splits.values()):
        raise UserError(f"There are no images in {source}: nothing to build.")
    jobs = tuple(
        Job(split=split, number=number, start=start, stop=min(start + shard_size, total))
        for split, total in raw.splits.items()
        for number, start in enumerate(range(0, total, shard_size))
    )
    return BuildPlan(
        dataset=dataset,
        source=source,
        out=out,
        options=options,
        raw=raw,
        settings={**raw.settings, "shard_size": shard_size, "encoding": ENCODING},
        jobs=jobs,
    )


def write_shard(plan: BuildPlan, job: Job) -> Written:
    """Write one shard, record it as finished, and return it.

    Raises:
        UserError: the source is not what it should be, or nothing can be written.
    """
    samples = DATASETS[plan.dataset].read(
        plan.source, job.split, job.start, job.stop, **plan.options
    )
    data, rows = write_tar(samples)
    storage.write_bytes(storage.join(plan.out, job.key), data)
    shard = Shard(
        split=job.split, key=job.key, samples=len(rows), bytes=len(data), sha256=sha256_hex(data)
    )
    written = Written(shard=shard, rows=rows)
    storage.write_bytes(plan.record(job), json.dumps(asdict(written)).encode())
    return written


def existing_manifest(plan: BuildPlan) -> Manifest | None:
    """Return the manifest at ``out`` if it is of this plan, and None if there is none.

    Raises:
        UserError: it is of another plan.
    """
    if not storage.exists(storage.join(plan.out, MANIFEST)):
        return None
    manifest, raw, other = read_manifest(plan.out), plan.raw, ""
    if manifest.settings_hash != digest(plan.settings):
        other = "with other settings"
    elif (manifest.dataset, manifest.sources) != (raw.dataset, raw.sources):
        other = "from other files"
    if other:
        raise UserError(f"{plan.out} holds {manifest.dataset} built {other}: {_ADVICE}.")
    return manifest


def _write_lost(plan: BuildPlan, manifest: Manifest) -> int:
    """Write the shards of a data set again that are missing or cut off; return their number.

    Raises:
        UserError: one comes out differently.
    """
    sizes = storage.list_files(plan.out)
    pairs = zip(plan.jobs, manifest.shards, strict=True)
    lost = [(job, shard) for job, shard in pairs if sizes.get(shard.key) != shard.bytes]
    for job, shard in lost:
        log.info("%s is lost: writing it again", shard.key)
        if write_shard(plan, job).shard != shard:
            raise UserError(f"{shard.key} in {plan.out} comes out differently: {_ADVICE}.")
    return len(lost)


def _write(plan: BuildPlan, workers: int) -> tuple[Manifest, int]:
    """Write what is missing; return the manifest and how many shards existed already."""
    if storage.create_bytes(plan.marker, plan.identity) != plan.identity:
        raise UserError(
            f"{plan.out} holds an unfinished build with other settings or files: {_ADVICE}."
        )
    finished = _finished(plan)
    missing, skipped = [job for job in plan.jobs if job.key not in finished], len(finished)

    def write(job: Job) -> Written:
        return write_shard(plan, job)

    written = write_with_ray(write, missing, workers) if workers else map(write, missing)
    samples = sum(job.stop - job.start for job in missing)
    finished |= {one.shard.key: one for one in with_progress(written, len(missing), samples)}
    return _complete(plan, [finished[job.key] for job in plan.jobs]), skipped


def _finished(plan: BuildPlan) -> dict[str, Written]:
    """Return the shards that an earlier, interrupted run has written, by their keys."""
    out: dict[str, Written] = {}
    sizes = storage.list_files(plan.out)
    names = {storage.join(plan.out, name) for name in sizes}
    for record in (plan.record(job) for job in plan.jobs):
        if record not in names:
            continue
        try:
            written = read(storage.read_bytes(record), Written, record)
            shard = written.shard
            # Its bytes may have rotted, or never reached the disk.
            if sizes.get(shard.key) == shard.bytes and shard.sha256 == sha256_hex(
                storage.read_bytes(storage.join(plan.out, shard.key))
            ):
                out[shard.key] = written
        except DamagedError as error:
            log.warning("%s: writing its shard again", str(error).rstrip("."))
    return out


def _complete(plan: BuildPlan, written: list[Written]) -> Manifest:
    """Write what is for people, then the manifest, and return it."""
    sizes, raw = storage.list_files(plan.out), plan.raw
    for one in written:
        if sizes.get(one.shard.key) != one.shard.bytes:
            raise UserError(
                f"{plan.out} has no {one.shard.key}, though a worker wrote it: on several nodes "
                "--out must be a place that all of them share, such as an s3:// URI."
            )
    extras = {SAMPLES: table(written, raw.label_names), **contact_sheets(plan.out, written)}
    for name, content in extras.items():
        storage.write_bytes(storage.join(plan.out, name), content)
    manifest = Manifest(
        dataset=raw.dataset,
        image_shape=raw.image_shape,
        splits=raw.splits,
        shards=tuple(one.shard for one in written),
        sources=raw.sources,
        settings=plan.settings,
        settings_hash=digest(plan.settings),
        label_names=raw.label_names,
        extras={name: sha256_hex(content) for name, content in extras.items()},
    )
    write_manifest(plan.out, manifest)
    if storage.is_local(plan.out):
        ours = {Path(name).name for name in (*sizes, *extras, MANIFEST)}
        for name in sizes:
            # half written when a run was killed: see storage.local.new_file
            if Path(name).name.startswith(".") and Path(name).stem[1:] in ours:
                (Path(plan.out) / name).unlink(missing_ok=True)
    return manifest
