"""Journals of version 0.1: what its runs could not send to MLflow, delivered once by ``sync``.

Later runs write none: their folder is the record. A journal is a file of JSON lines, a header and
then entries in order; ``.sent`` beside it counts the entries that MLflow has.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from ivegan import storage
from ivegan.errors import UserError
from pipelines.paths import tracking_uri
from pipelines.tracking.client import KEY, client, experiment_of, find_run

_NAME = re.compile(r"[^/]+\.jsonl|([^/]+/)?(evaluation-\d+/)?journal\.jsonl")


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
        uri = tracking_uri(header["uri"])
        tracked = client(uri)
        run_id = _run_of(tracked, uri, header[KEY], entries)
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
            counts[header[KEY]] = count
    return counts


def _journals(where: str | Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Return place without suffix, header and entries of each, those that start a run first."""
    place = storage.absolute(where)
    names = [name for name in storage.list_files(place) if _NAME.fullmatch(name)]
    stems = [storage.join(place, name.removesuffix(".jsonl")) for name in names]
    journals = [(stem, *_read(stem)) for stem in stems]
    journals = [journal for journal in journals if KEY in journal[1]]
    return sorted(journals, key=lambda journal: not any("start" in e for e in journal[2]))


def _read(stem: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return header and entries, as far as lines are whole."""
    lines: list[dict[str, Any]] = []
    for line in storage.read_bytes(f"{stem}.jsonl").decode(errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the process was killed while it wrote
            break
    return (lines[0], lines[1:]) if lines else ({}, [])


def _sent(stem: str) -> int:
    try:
        return int(json.loads(storage.read_bytes(f"{stem}.sent"))["entries"])
    except (ValueError, TypeError, KeyError, UserError):
        return 0  # entries sent twice are one entry in MLflow


def _run_of(tracked: MlflowClient, uri: str, key: str, entries: list[dict[str, Any]]) -> str | None:
    """Return the MLflow run of a journal, created if its start was never sent."""
    if (run_id := find_run(tracked, key)) is not None:
        return run_id
    entry = next((entry for entry in entries if "start" in entry), None)
    if entry is None:
        return None
    start = entry["start"]
    parent = start["parent"] and find_run(tracked, start["parent"])
    tags = {**start["tags"], KEY: key} | ({"mlflow.parentRunId": parent} if parent else {})
    experiment = experiment_of(tracked, start["experiment"], uri)
    name, time = start["run_name"], entry["timestamp"]
    return tracked.create_run(experiment, time, tags, name).info.run_id


def _send(tracked: MlflowClient, run_id: str, entry: Mapping[str, Any], stem: str) -> None:
    """Send one entry; sending it again changes nothing."""
    if "start" in entry:
        existing = tracked.get_run(run_id).data.params
        params = entry["start"]["params"].items()
        missing = [Param(k, v) for k, v in params if k not in existing]
        tracked.log_batch(run_id, params=missing)
        tracked.log_dict(run_id, entry["start"]["config"], "config.json")
    if metrics := entry.get("metrics"):
        time, step = entry["timestamp"], entry["step"]
        points = [Metric(name, value, time, step) for name, value in metrics.items()]
        tracked.log_batch(run_id, metrics=points)
    if tags := entry.get("tags"):
        tracked.log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
    file = entry.get("file")
    if file and storage.exists(storage.join(stem, file)):
        with TemporaryDirectory() as tmp:
            path = Path(tmp, PurePosixPath(file).name)
            path.write_bytes(storage.read_bytes(storage.join(stem, file)))
            tracked.log_artifact(run_id, str(path), PurePosixPath(file).parent.as_posix())
    if entry.get("status") in ("FINISHED", "FAILED", "KILLED"):
        tracked.set_terminated(run_id, entry["status"], entry["timestamp"])
