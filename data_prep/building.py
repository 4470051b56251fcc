"""Shards, table, contact sheets and manifest of a data set, from its raw files.

Each shard is one Ray task, or one turn of a plain loop with no workers; the bytes are the same. The
manifest is written last, so an interrupted build is no data set; run again, it writes the missing
shards. Two builds of the same data into one place write the same bytes and may run at once; a build
with other settings is refused.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
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
from ivegan.digest import digest, sha256_hex
from ivegan.errors import UserError
from ivegan.schema import DamagedError, read

log = logging.getLogger(__name__)

DATASETS: dict[str, ModuleType] = {"digits": digits, "mnist": mnist, "celeba": celeba}
_UNFINISHED = ".unfinished"  # folder with the plan and a record of each shard
_ADVICE = "choose another --out, or delete the existing files"


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
class BuildPlan:
    """All that is decided before the first shard is written."""

    about: Source
    out: str
    settings: dict[str, Any]
    jobs: tuple[Job, ...]
    records: str
    """Folder of what is noted until all is done."""

    @property
    def identity(self) -> bytes:
        """Return what another build must agree with to write into the same place."""
        what = {
            "dataset": self.about.dataset,
            "sources": self.about.sources,
            "settings": self.settings,
        }
        return (json.dumps(what, sort_keys=True, indent=1) + "\n").encode()

    @property
    def marker(self) -> str:
        """Return where the identity is while a build is unfinished."""
        return storage.join(self.records, "plan.json")


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
        source: folder or URI of the raw files; mnist also takes what ``mnist.fetched`` does.
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
    if dataset == "mnist" and source is not None:
        source = mnist.fetched(source, out)
    plan = make_plan(dataset, source, out, shard_size=shard_size, name=name, crop=crop, limit=limit)
    manifest, skipped = existing_manifest(plan), len(plan.jobs)
    if manifest is None:
        try:
            manifest, skipped = _write(plan, workers)
        except UserError:
            # An equal build that ended first has cleared away the records this one needed.
            manifest = existing_manifest(plan)
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
    records = storage.join(out, _UNFINISHED)
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
    return BuildPlan(about=about, out=out, settings=settings, jobs=tuple(jobs), records=records)


def write_shard(job: Job) -> Written:
    """Write one shard, note it as finished, and return it; an object store is waited for.

    Raises:
        UserError: the source is not what it should be, or nothing can be written.
    """
    return storage.patiently(_write_shard, job)


def _write_shard(job: Job) -> Written:
    key = shard_key(job.split, job.number)
    samples = DATASETS[job.dataset].read(job.source, job.split, job.start, job.stop, **job.options)
    raw, rows = write_tar(samples)
    storage.write_bytes(storage.join(job.out, key), raw)
    shard = Shard(
        split=job.split,
        key=key,
        samples=len(rows),
        bytes=len(raw),
        sha256=sha256_hex(raw),
    )
    written = Written(shard=shard, rows=rows)
    storage.write_bytes(job.record, json.dumps(dataclasses.asdict(written)).encode())
    return written


def existing_manifest(plan: BuildPlan) -> Manifest | None:
    """Return the manifest at ``out`` if it is of this plan, and None if there is none.

    Raises:
        UserError: something else is there, or being built.
    """
    if storage.exists(storage.join(plan.out, MANIFEST)):
        manifest = read_manifest(plan.out)
        about = plan.about
        if manifest.settings_hash != digest(plan.settings):
            raise UserError(
                f"{plan.out} holds {manifest.dataset} built with other settings: {_ADVICE}."
            )
        if (manifest.dataset, manifest.sources) != (about.dataset, about.sources):
            raise UserError(
                f"{plan.out} holds {manifest.dataset} built from other files: {_ADVICE}."
            )
        return manifest
    if storage.exists(plan.marker):
        _check_claim(plan, storage.read_bytes(plan.marker))
    return None


def _write(plan: BuildPlan, workers: int) -> tuple[Manifest, int]:
    """Write what is missing; return the manifest and how many shards were there already."""
    _claim(plan)
    finished = _finished(plan)
    missing = [job for job in plan.jobs if shard_key(job.split, job.number) not in finished]
    skipped = len(finished)
    if workers == 0:
        written: Iterable[Written] = map(write_shard, missing)
    else:
        written = write_with_ray(write_shard, missing, workers)
    for one in with_progress(written, missing):
        finished[one.shard.key] = one
    return storage.patiently(_complete, plan, finished), skipped


def _claim(plan: BuildPlan) -> None:
    """Mark the place as this plan's, unless it is another's.

    Raises:
        UserError: a build with other settings or files came first.
    """
    _check_claim(plan, storage.create_bytes(plan.marker, plan.identity))


def _check_claim(plan: BuildPlan, claim: bytes) -> None:
    if claim != plan.identity:
        raise UserError(
            f"{plan.out} holds an unfinished build with other settings or files: {_ADVICE}."
        )


def _finished(plan: BuildPlan) -> dict[str, Written]:
    """Return the shards that an earlier, interrupted run has written, by their keys."""
    out: dict[str, Written] = {}
    wanted = {job.record.rpartition("/")[2] for job in plan.jobs}
    names = sorted(wanted & set(storage.list_names(plan.records)))
    sizes = storage.list_files(plan.out) if names else {}
    for name in names:
        record = storage.join(plan.records, name)
        try:
            written = read(storage.read_bytes(record), Written, record)
        except DamagedError as error:
            log.warning("%s: writing its shard again", error)
            continue
        shard = written.shard
        # Its bytes may have rotted, or never reached the disk.
        if sizes.get(shard.key) == shard.bytes and shard.sha256 == sha256_hex(
            storage.read_bytes(storage.join(plan.out, shard.key))
        ):
            out[shard.key] = written
    return out


def _complete(plan: BuildPlan, finished: dict[str, Written]) -> Manifest:
    """Write what is for people, then the manifest, and return it.

    Raises:
        UserError: a shard that another node has written cannot be seen from here, or another build
            has taken the place.
    """
    sizes = storage.list_files(plan.out)
    written = [finished[shard_key(job.split, job.number)] for job in plan.jobs]
    for one in written:
        if sizes.get(one.shard.key) != one.shard.bytes:
            raise UserError(
                f"{plan.out} has no {one.shard.key}, though a worker wrote it: on several nodes "
                "--out must be a place that all of them share, such as an s3:// URI."
            )
    extras = {SAMPLES: table(written, plan.about.label_names), **contact_sheets(plan.out, written)}
    for name, content in extras.items():
        storage.write_bytes(storage.join(plan.out, name), content)
    manifest = Manifest(
        dataset=plan.about.dataset,
        image_shape=plan.about.image_shape,
        splits=plan.about.splits,
        shards=tuple(one.shard for one in written),
        sources=plan.about.sources,
        settings=plan.settings,
        settings_hash=digest(plan.settings),
        label_names=plan.about.label_names,
        extras={name: hashlib.sha256(content).hexdigest() for name, content in extras.items()},
    )
    if storage.is_local(plan.out):
        ours = {Path(name).name for name in (*sizes, *extras, MANIFEST)}
        for name in sizes:
            # half written when a run was killed: see storage.local.new_file
            if Path(name).name.startswith(".") and Path(name).stem[1:] in ours:
                (Path(plan.out) / name).unlink(missing_ok=True)
    # A store may let two builds claim one place: its conditional writes are not always atomic. But
    # one of the claims stands, and an equal build that was faster has left the manifest instead.
    if existing_manifest(plan) is None:
        _claim(plan)
    write_manifest(plan.out, manifest)
    return manifest
