"""The record of a run: files in its folder, each written atomically.

    run.json                             settings, data, code and status, by the driver
    metrics/0000012800.jsonl             one flush of metrics, by rank 0; never rewritten
    metrics/0000012800-score.jsonl       scores of a sweep's trial, by its driver
    figures/samples-0000012800.png       by rank 0
    evaluation-0000012800/metrics.json   numbers, figures and report, by evaluate.py

MLflow is a mirror of these files (``pipelines.tracking.mirror``); nothing is read back from it.
"""

import dataclasses
import json
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import psutil

from ivegan import storage
from ivegan.config import Config, from_dict, to_dict
from ivegan.storage.schema import DamagedError, check, parse_json, read

log = logging.getLogger(__name__)

RUN, METRICS, FIGURES = "run.json", "metrics", "figures"
RATE = "rate/images_per_second"  # of each flush
SCHEMA = 1
HOW = ("stream", "precision", "accumulate", "compile")
"""Options that numbers depend on."""
ENDED = ("FINISHED", "FAILED", "KILLED")
_REMEDY = "restore or delete it"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What ``run.json`` holds; every default stands for what an older run did not write."""

    schema: int = SCHEMA
    run_id: str
    kind: str = "train"
    preset: str
    config: dict[str, Any]
    precision: str = "float32"
    accumulate: int = 1
    stream: bool = False
    compile: bool = False
    threads: int = 1
    world_size: int = 1
    data: str | None = None
    dataset_hash: str = ""
    config_hash: str = ""
    git_commit: str = "unknown"
    parent: str | None = None
    """Run id of the sweep, or an MLflow run id."""
    experiment: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    """MLflow parameters beside the configuration; of a sweep, its space."""
    key: str
    """Unique per run; the MLflow run is found by it."""
    status: str = "RUNNING"
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    pid_started: float = field(default_factory=lambda: psutil.Process().create_time())
    started: int = field(default_factory=lambda: now())
    ended: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """Metrics at a number of images seen."""

    images_seen: int
    time: int
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the ``metrics.json`` of an evaluation holds."""

    metrics: dict[str, float]
    metadata: dict[str, Any]
    """Of the checkpoint and its data, with ``config``."""


def now() -> int:
    """Return the time in milliseconds, as MLflow counts it."""
    return time.time_ns() // 1_000_000


def new_key(run_id: str) -> str:
    """Return a key for a new run, unlike any other."""
    return f"{run_id}-{uuid.uuid4().hex[:12]}"


def exists(run_uri: str) -> bool:
    """Return whether a folder holds the record of a run."""
    return storage.exists(storage.join(run_uri, RUN))


def read_record(run_uri: str) -> RunRecord:
    """Return a run's record; what an older version did not write is filled in.

    Raises:
        UserError: there is none, or it is not readable.
    """
    where = storage.join(run_uri, RUN)
    found = parse_json(storage.read_bytes(where), where, _REMEDY)
    if isinstance(found, dict) and "schema" not in found:
        found = _of_older_run(found, run_uri, where)
    if isinstance(found, dict) and "micro_batches" in found:  # as a later version called it
        found["accumulate"] = found.pop("micro_batches")
    return check(found, RunRecord, where, _REMEDY)


def _of_older_run(found: dict[str, Any], run_uri: str, where: str) -> dict[str, Any]:
    run_id = found.get("run_id") or run_uri.rpartition("/")[2]
    check(found.get("config"), Config, where, _REMEDY)
    names = {f.name for f in dataclasses.fields(RunRecord)}
    return {
        **{k: v for k, v in found.items() if k in names},
        "schema": 0,
        "run_id": run_id,
        "preset": found.get("preset", found["config"]["dataset"]),
        "threads": found.get("threads_per_worker", 1),
        "experiment": f"ivegan-{found['config']['dataset']}",
        "key": found.get("run_key") or found.get("mlflow_run_id") or run_id,
        "status": "UNKNOWN",  # it was in MLflow only
        "host": "",
        "pid": 0,
        "pid_started": 0.0,
        "started": 0,
    }


def write_record(run_uri: str, record: RunRecord) -> None:
    """Write a run's record."""
    text = json.dumps(dataclasses.asdict(record), indent=2) + "\n"
    storage.write_bytes(storage.join(run_uri, RUN), text.encode())


def end_record(run_uri: str, status: str, **tags: str) -> None:
    """Write that a run ended, with tags that say why."""
    record = read_record(run_uri)
    changes = {"status": status, "ended": now(), "tags": {**record.tags, **tags}}
    write_record(run_uri, dataclasses.replace(record, **changes))


def is_dead(host: str, pid: int, pid_started: float) -> bool:
    """Return whether a process of this machine has ended, whose number may have another now."""
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(pid).create_time() - pid_started) > 1
    except psutil.NoSuchProcess:
        return True


def ended_if_dead(record: RunRecord) -> RunRecord:
    """Return a record, as KILLED if the run's driver is dead on this machine."""
    if record.status != "RUNNING" or not is_dead(record.host, record.pid, record.pid_started):
        return record
    return dataclasses.replace(record, status="KILLED", ended=now())


def list_runs(storage_uri: str) -> list[str]:
    """Return the URIs of all runs directly below a folder, and of the folder if it is a run's."""
    below = (storage.join(storage_uri, name) for name in storage.list_names(storage_uri))
    return [uri for uri in (storage_uri, *below) if exists(uri)]


def evaluation_uri(run_uri: str, images_seen: int) -> str:
    """Return the folder of a checkpoint's evaluation."""
    return storage.join(run_uri, f"evaluation-{images_seen:010d}")


def write_points(
    run_uri: str, images_seen: int, metrics: Mapping[str, float], suffix: str = ""
) -> None:
    """Write the metrics of one flush, unless they exist; those that are not finite are left out."""
    name = f"{images_seen:010d}{suffix and f'-{suffix}'}.jsonl"
    where = storage.join(run_uri, METRICS, name)
    finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
    point = {"images_seen": images_seen, "time": now(), "metrics": finite}
    if finite:
        _write_new(where, json.dumps(point).encode() + b"\n")


def read_point(uri: str) -> Point:
    """Return the metrics of one flush.

    Raises:
        UserError: the file is damaged, or the storage does not give it.
    """
    return read(storage.read_bytes(uri), Point, uri, "delete it")


def sound_points(uris: Iterable[str]) -> Iterator[Point]:
    """Yield the metrics of many files; a damaged one is left out with a warning."""
    for uri in uris:
        try:
            yield read_point(uri)
        except DamagedError as error:
            log.warning("%s", error)


def sound_evaluation(uri: str) -> Evaluation | None:
    """Return what a ``metrics.json`` holds, or None with a warning where it is damaged."""
    try:
        found = parse_json(storage.read_bytes(uri), uri, _REMEDY)
        if isinstance(found, dict) and "facts" in found:  # as version 0.1 called it
            found["metadata"] = found.pop("facts")
        evaluation = check(found, Evaluation, uri, _REMEDY)
        config = evaluation.metadata.get("config")
        check(config, Config, uri, _REMEDY)
        evaluation.metadata["config"] = to_dict(from_dict(config))  # as this version writes it
        return evaluation
    except DamagedError as error:
        log.warning("%s", error)
        return None


def read_metrics(run_uri: str) -> list[Point]:
    """Return all points of a run, in the order of images seen."""
    folder = storage.join(run_uri, METRICS)
    names = [n for n in storage.list_names(folder) if n.endswith(".jsonl") and n[0] != "."]
    return list(sound_points(storage.join(folder, name) for name in names))


def points_with(run_uri: str, name: str) -> list[Point]:
    """Return the points of a run that have a metric, one for each number of images seen."""
    points = {p.images_seen: p for p in read_metrics(run_uri) if name in p.metrics}
    return [points[images] for images in sorted(points)]


def training_seconds(flushes: Iterable[Point], start: int = 0) -> float:
    """Return the seconds of training alone of flushes, the first since a number of images seen."""
    seconds = 0.0
    for point in flushes:
        seconds += (point.images_seen - start) / point.metrics[RATE]
        start = point.images_seen
    return seconds


class MetricsWriter:
    """Writes a run's points and figures in a thread, so that training does not wait for storage."""

    def __init__(self, run_uri: str) -> None:
        self._run_uri = run_uri
        self._thread = ThreadPoolExecutor(1, "metrics")
        self._writes: list[Future[None]] = []

    def add(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Write points at a number of images seen."""
        self._write(write_points, self._run_uri, images_seen, dict(metrics))

    def add_figure(self, name: str, images_seen: int, png: bytes) -> None:
        """Write a figure."""
        where = storage.join(self._run_uri, FIGURES, f"{name}-{images_seen:010d}.png")
        self._write(_write_new, where, png)

    def join(self) -> None:
        """Return when all is written; a checkpoint is saved after that.

        Raises:
            UserError: the storage does not take it.
        """
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def close(self) -> None:
        """Return when all is written, and end the thread."""
        with self._thread:
            self.join()

    def _write(self, call: Callable[..., None], *given: Any) -> None:
        self._writes.append(self._thread.submit(call, *given))


def _write_new(uri: str, content: bytes) -> None:
    if not storage.exists(uri):
        storage.write_bytes(uri, content)
