"""Turn a raw data set into shards and a manifest, with a table and pictures for people.

Each shard is one Ray task, or one turn of a plain loop with ``--workers 0``; the bytes are the
same. The manifest is written last, so what was interrupted is no data set; run again, the command
goes on with the shards that are missing, and does nothing where all is done. Two builds of the same
data into one place write the same bytes and may run at once; another one is refused.

    python data_prep/build.py digits --out runs/data/digits --workers 0
    python data_prep/build.py mnist --source ~/mnist --out s3://bucket/mnist --workers 4

The first ends with 1797 samples in 4 shards.
"""

import dataclasses
import hashlib
import io
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

import numpy as np
from PIL import Image

from data_prep import celeba, digits, mnist
from data_prep.source import Source
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
from ivegan.data.tars import Row, decode, write_tar
from ivegan.digest import digest, sha256_hex
from ivegan.errors import UserError
from pipelines import options as cli

log = logging.getLogger(__name__)

DATASETS: dict[str, ModuleType] = {"digits": digits, "mnist": mnist, "celeba": celeba}
_UNFINISHED = ".unfinished"  # folder with the plan and a record of each shard, until all is done
_ADVICE = "choose another --out, or delete what is there"
_CONTACTS = 80  # images on a contact sheet
_COLUMNS = 10


@dataclass(frozen=True, kw_only=True)
class Build(cli.Options):
    """Turn a raw data set into shards and a manifest. Run again, it goes on, or does nothing."""

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
        """Return where the identity stands while a build goes on."""
        return storage.join(self.records, "plan.json")


@dataclass(frozen=True, kw_only=True)
class Written:
    """A finished shard and where it holds its samples."""

    shard: Shard
    rows: list[Row]


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
    manifest, skipped = _standing(plan), len(plan.jobs)
    if manifest is None:
        try:
            manifest, skipped = _write(plan, workers)
        except UserError:
            # An equal build that ended first has cleared away the records this one needed.
            manifest = _standing(plan)
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
    return Plan(about=about, out=out, settings=settings, jobs=tuple(jobs), records=records)


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
    record = {"shard": dataclasses.asdict(shard), "rows": rows}
    storage.write_bytes(job.record, json.dumps(record).encode())
    return Written(shard=shard, rows=rows)


def main(options: Build) -> dict[str, Any]:
    """Build, or tell the plan, and return the JSON object."""
    if options.out is None:
        raise UserError("build.py needs --out, a folder or s3:// URI for the data set.")
    options.at_least(workers=0)
    choice: dict[str, Any] = {
        "shard_size": options.shard_size,
        "name": options.name,
        "crop": options.crop,
        "limit": options.limit,
    }
    if options.dry_run:
        where = options.source
        if options.dataset == "mnist" and where is not None and mnist.is_remote(where):
            where = mnist.raw_uri(options.out)
            if not storage.exists(where):
                print(f"{options.source} would first be downloaded to {where}")
                return {"source": options.source, "out": storage.absolute(options.out)}
        plan = make_plan(options.dataset, where, options.out, **choice)
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


def _write(plan: Plan, workers: int) -> tuple[Manifest, int]:
    """Write what is missing; return the manifest and how many shards were there already."""
    _claim(plan)
    finished = _finished(plan)
    missing = [job for job in plan.jobs if shard_key(job.split, job.number) not in finished]
    skipped = len(finished)
    if workers == 0:
        written: Iterable[Written] = map(write_shard, missing)
    else:
        written = _written_by_ray(missing, workers)
    for one in _shown(written, missing):
        finished[one.shard.key] = one
    return storage.patiently(_complete, plan, finished), skipped


def _claim(plan: Plan) -> None:
    """Mark the place as this plan's, unless it is another's.

    Raises:
        UserError: a build with other settings or files came first.
    """
    _check_claim(plan, storage.create_bytes(plan.marker, plan.identity))


def _check_claim(plan: Plan, claim: bytes) -> None:
    if claim != plan.identity:
        raise UserError(
            f"{plan.out} holds an unfinished build with other settings or files: {_ADVICE}."
        )


def _finished(plan: Plan) -> dict[str, Written]:
    """Return the shards that an earlier, interrupted run has written, by their keys."""
    out: dict[str, Written] = {}
    wanted = {job.record.rpartition("/")[2] for job in plan.jobs}
    names = sorted(wanted & set(storage.list_names(plan.records)))
    sizes = storage.list_files(plan.out) if names else {}
    for name in names:
        record = json.loads(storage.read_bytes(storage.join(plan.records, name)))
        shard = Shard(**record["shard"])
        if sizes.get(shard.key) == shard.bytes:
            out[shard.key] = Written(shard=shard, rows=[Row(*row) for row in record["rows"]])
    return out


def _complete(plan: Plan, finished: dict[str, Written]) -> Manifest:
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
    extras = {SAMPLES: _table(plan, written), **_contact_sheets(plan, written)}
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
            # half written when a run was killed: see storage.new_file
            if Path(name).name.startswith(".") and Path(name).stem[1:] in ours:
                (Path(plan.out) / name).unlink(missing_ok=True)
    # A store may let two builds claim one place: its conditional writes are not always atomic. But
    # one of the claims stands, and an equal build that was faster has left the manifest instead.
    if _standing(plan) is None:
        _claim(plan)
    write_manifest(plan.out, manifest)
    return manifest


def _table(plan: Plan, written: list[Written]) -> bytes:
    """Return a Parquet file with a row per sample."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [(one.shard, row) for one in written for row in one.rows]
    columns: dict[str, pa.Array] = {
        "key": pa.array([row.key for _, row in rows]),
        "split": pa.array([shard.split for shard, _ in rows]).dictionary_encode(),
        "shard": pa.array([shard.key for shard, _ in rows]).dictionary_encode(),
        "offset": pa.array([row.offset for _, row in rows], pa.int64()),
        "bytes": pa.array([row.bytes for _, row in rows], pa.int32()),
    }
    for name in rows[0][1].meta:
        values = [row.meta[name] for _, row in rows]
        if name == "attributes":
            for place, attribute in enumerate(plan.about.label_names):
                columns[attribute] = pa.array([bool(value[place]) for value in values])
        else:
            columns[name] = pa.array(values)
    into = io.BytesIO()
    parquet.write_table(pa.table(columns), into, compression="zstd")
    return into.getvalue()


def _contact_sheets(plan: Plan, written: list[Written]) -> dict[str, bytes]:
    """Return a PNG per split of images from its first to its last, read back from the shards."""
    sheets = {}
    for split, total in plan.about.splits.items():
        rows = [(one.shard, row) for one in written if one.shard.split == split for row in one.rows]
        if not rows:
            continue
        count = min(total, _CONTACTS)
        some = [rows[place * total // count] for place in range(count)]
        images = [
            decode(storage.read_range(storage.join(plan.out, shard.key), row.offset, row.bytes))
            for shard, row in some
        ]
        sheets[f"contact-{split}.png"] = _side_by_side(np.stack(images))
    return sheets


def _side_by_side(images: np.ndarray) -> bytes:
    """Return a PNG of images (n, c, h, w), ten in a row, enlarged where they are tiny."""
    count, channels, height, _ = images.shape
    scale, gap = max(1, 64 // height), 4
    tiles = images.repeat(scale, axis=2).repeat(scale, axis=3)
    around = ((0, -count % _COLUMNS), (0, 0), (0, gap), (0, gap))
    tiles = np.pad(tiles, around, constant_values=255)
    _, _, height, width = tiles.shape
    rows = tiles.reshape(-1, _COLUMNS, channels, height, width).transpose(0, 3, 1, 4, 2)
    page = rows.reshape(-1, _COLUMNS * width, channels)
    page = np.pad(page, ((gap, 0), (gap, 0), (0, 0)), constant_values=255)
    into = io.BytesIO()
    Image.fromarray(page[..., 0] if channels == 1 else page).save(into, "PNG", compress_level=1)
    return into.getvalue()


def _written_by_ray(jobs: list[Job], workers: int) -> Iterator[Written]:
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
            logging_level=logging.ERROR,
        )
    try:
        where = {"env_vars": storage.environment()}
        task = ray.remote(num_cpus=1, runtime_env=where, scheduling_strategy="SPREAD")(write_shard)
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


def _shown(written: Iterable[Written], jobs: list[Job]) -> Iterator[Written]:
    """Yield the shards, with a bar where somebody watches and some lines where nobody does."""
    total = sum(job.stop - job.start for job in jobs)
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, unit=" images", unit_scale=True, desc="build") as bar:
            for one in written:
                bar.update(one.shard.samples)
                yield one
        return
    began, images = time.perf_counter(), 0
    for done, one in enumerate(written, start=1):
        images += one.shard.samples
        if done * 10 // len(jobs) > (done - 1) * 10 // len(jobs):
            rate = images / (time.perf_counter() - began)
            log.info(
                "%d of %d shards, %.0f images/s, %.0f s left",
                done,
                len(jobs),
                rate,
                (total - images) / rate,
            )
        yield one


if __name__ == "__main__":
    from data_prep.build import command as run_command  # so that tasks are found by module name

    run_command()
