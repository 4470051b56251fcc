"""Journals of version 0.1: what its runs could not send to MLflow, delivered once by ``sync``.

Later runs write none: their folder is the record. A journal is a file of JSON lines, a header and
then entries in order; ``.sent`` beside it counts the entries that MLflow has.
"""

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from ivegan import storage
from ivegan.errors import UserError
from ivegan.storage.schema import DamagedError, inside, parse_json, read
from pipelines.paths import tracking_uri
from pipelines.tracking.client import KEY, client, experiment_of, find_run

log = logging.getLogger(__name__)

_NAME = re.compile(r"[^/]+\.jsonl|([^/]+/)?(evaluation-\d+/)?journal\.jsonl")


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The first line."""

    uri: str
    run_key: str
    kept: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Start:
    """A run's settings."""

    experiment: str
    run_name: str
    params: dict[str, str]
    tags: dict[str, str]
    config: dict[str, Any]
    dataset: list[str | None] | None = None
    parent: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Another line, which has some of these."""

    timestamp: int
    start: _Start | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    step: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    file: str | None = None
    status: str | None = None

    def __post_init__(self) -> None:
        if self.file:
            inside(self.file)


_Journal = tuple[str, _Header, list[_Entry]]
"""Place without suffix, header and entries."""


def deliver(where: str | Path) -> dict[str, int]:
    """Send the entries that journals below a folder still hold; return their number by run.

    Raises:
        MlflowException, OSError, UserError: a server does not answer; the rest is sent next time.
    """
    sent = {}
    for stem, header, entries in _journals(where):
        waiting = entries[_sent(stem) :]
        if not waiting:
            continue
        uri = tracking_uri(header.uri)
        tracked = client(uri)
        run_id = _run_of(tracked, uri, header.run_key, entries)
        if run_id is None:
            continue  # deleted, or never started
        for entry in waiting:
            _send(tracked, run_id, entry, stem)
        note = {"run_id": run_id, "entries": len(entries)}
        storage.write_bytes(f"{stem}.sent", json.dumps(note).encode())
        sent[run_id] = len(waiting)
    return sent


def waiting(where: str | Path) -> dict[str, int]:
    """Return the number of entries that ``deliver`` would send, by run."""
    counts = {}
    for stem, header, entries in _journals(where):
        if count := len(entries) - _sent(stem):
            counts[header.run_key] = count
    return counts


def _journals(where: str | Path) -> list[_Journal]:
    """Return all journals, those that start a run first."""
    place = storage.absolute(where)
    names = [name for name in storage.list_files(place) if _NAME.fullmatch(name)]
    stems = [storage.join(place, name.removesuffix(".jsonl")) for name in names]
    journals = [journal for journal in map(_read, stems) if journal]
    return sorted(journals, key=lambda journal: not any(e.start for e in journal[2]))


def _read(stem: str) -> _Journal | None:
    """Return a journal up to a damaged line, such as a killed process leaves; None without any."""
    header, entries, name = None, [], f"{stem}.jsonl"
    try:
        first, *lines = storage.read_bytes(name).splitlines() or [b""]
        header = read(first, _Header, name)
        for line in lines:
            entries.append(read(line, _Entry, name))
    except DamagedError as error:
        log.warning("%s", error)
    return header and (stem, header, entries)


def _sent(stem: str) -> int:
    try:
        return int(parse_json(storage.read_bytes(f"{stem}.sent"), stem)["entries"])
    except (ValueError, TypeError, KeyError, UserError):
        return 0  # entries sent twice are one entry in MLflow


def _run_of(tracked: MlflowClient, uri: str, key: str, entries: list[_Entry]) -> str | None:
    """Return the MLflow run of a journal, created if its start was never sent."""
    if (run_id := find_run(tracked, key)) is not None:
        return run_id
    for entry in entries:
        if start := entry.start:
            parent = start.parent and find_run(tracked, start.parent)
            tags = {**start.tags, KEY: key} | ({"mlflow.parentRunId": parent} if parent else {})
            experiment = experiment_of(tracked, start.experiment, uri)
            made = tracked.create_run(experiment, entry.timestamp, tags, start.run_name)
            return made.info.run_id
    return None


def _send(tracked: MlflowClient, run_id: str, entry: _Entry, stem: str) -> None:
    """Send one entry; sending it again changes nothing."""
    if entry.start:
        existing = tracked.get_run(run_id).data.params
        params = entry.start.params.items()
        missing = [Param(k, v) for k, v in params if k not in existing]
        tracked.log_batch(run_id, params=missing)
        tracked.log_dict(run_id, entry.start.config, "config.json")
    points = [Metric(k, v, entry.timestamp, entry.step) for k, v in entry.metrics.items()]
    tags = [RunTag(k, v) for k, v in entry.tags.items()]
    if points or tags:
        tracked.log_batch(run_id, metrics=points, tags=tags)
    file = entry.file
    if file and not storage.is_inside(stem, file):
        log.warning("%s leads out of %s: left out", file, stem)
    elif file and storage.exists(storage.join(stem, file)):
        with TemporaryDirectory() as tmp:
            path = Path(tmp, PurePosixPath(file).name)
            path.write_bytes(storage.read_bytes(storage.join(stem, file)))
            tracked.log_artifact(run_id, str(path), PurePosixPath(file).parent.as_posix())
    if entry.status in ("FINISHED", "FAILED", "KILLED"):
        tracked.set_terminated(run_id, entry.status, entry.timestamp)
