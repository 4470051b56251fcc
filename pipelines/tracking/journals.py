"""Journals of version 0.1: what its runs could not send to MLflow, delivered once by ``sync``.

Later runs write none: their folder is the record. A journal is a file of JSON lines, a header and
then entries in order; ``.sent`` beside it counts the entries that MLflow has.
"""

import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, RunTag

from ivegan import storage
from ivegan.errors import UserError
from ivegan.storage.schema import DamagedError, inside, parse_json, read
from pipelines.paths import tracking_uri
from pipelines.record import ENDED
from pipelines.tracking.client import (
    KEY,
    client,
    experiment_of,
    find_run,
    log_file,
    log_settings,
)

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


_Journal = tuple[str, _Header, list[_Entry], int]
"""Place without suffix, header, entries, and how many of them MLflow has."""


def deliver(folder: str | Path) -> dict[str, int]:
    """Send the entries that journals below a folder still hold; return their number by run.

    Raises:
        MlflowException, OSError, UserError: a server does not answer; the rest is sent next time.
    """
    counts = {}
    for stem, header, entries, sent in _journals(folder):
        uri = tracking_uri(header.uri)
        tracked = client(uri)
        run_id = _run_of(tracked, uri, header.run_key, entries)
        if run_id is None:
            continue  # deleted, or never started
        for entry in entries[sent:]:
            _send(tracked, run_id, entry, stem)
        note = {"run_id": run_id, "entries": len(entries)}
        storage.write_bytes(f"{stem}.sent", json.dumps(note).encode())
        counts[run_id] = len(entries) - sent
    return counts


def waiting(folder: str | Path) -> dict[str, int]:
    """Return the number of entries that ``deliver`` would send, by run."""
    return {h.run_key: len(entries) - sent for _, h, entries, sent in _journals(folder)}


def _journals(folder: str | Path) -> list[_Journal]:
    """Return the journals that are not sent to their end, those that start a run first."""
    names = [name for name in storage.list_files(folder) if _NAME.fullmatch(name)]
    journals = [_read(storage.join(folder, name.removesuffix(".jsonl"))) for name in names]
    unsent = [one for one in journals if one is not None and len(one[2]) > one[3]]
    return sorted(unsent, key=lambda journal: not any(e.start for e in journal[2]))


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
    try:
        sent = int(parse_json(storage.read_bytes(f"{stem}.sent"), stem)["entries"])
    except (ValueError, TypeError, KeyError, UserError):
        sent = 0  # entries sent twice are one entry in MLflow
    return header and (stem, header, entries, sent)


def _run_of(tracked: MlflowClient, uri: str, key: str, entries: list[_Entry]) -> str | None:
    """Return the MLflow run of a journal, created if its start was never sent."""
    run_id = find_run(tracked, key)
    for entry in entries:
        if run_id is None and (start := entry.start):
            parent = start.parent and find_run(tracked, start.parent)
            tags = {**start.tags, KEY: key} | ({"mlflow.parentRunId": parent} if parent else {})
            experiment = experiment_of(tracked, start.experiment, uri)
            made = tracked.create_run(experiment, entry.timestamp, tags, start.run_name)
            run_id = made.info.run_id
    return run_id


def _send(tracked: MlflowClient, run_id: str, entry: _Entry, stem: str) -> None:
    """Send one entry; sending it again changes nothing."""
    if start := entry.start:
        log_settings(tracked, run_id, start.params, {})
        tracked.log_dict(run_id, start.config, "config.json")
    points = [Metric(k, v, entry.timestamp, entry.step) for k, v in entry.metrics.items()]
    tags = [RunTag(k, v) for k, v in entry.tags.items()]
    if points or tags:
        tracked.log_batch(run_id, metrics=points, tags=tags)
    if entry.file and storage.exists(storage.join(stem, entry.file)):
        folder = PurePosixPath(entry.file).parent.as_posix()
        log_file(tracked, run_id, stem, entry.file, folder)
    if entry.status in ENDED:
        tracked.set_terminated(run_id, entry.status, entry.timestamp)
