"""MLflow as a mirror of run folders: one idempotent function copies what MLflow lacks.

A run is found by its key, which is a tag. Points sent twice are one point, since MLflow drops equal
ones, so a copy may be cut anywhere and made again. ``mlflow.json`` in the run's folder names the
MLflow run and what it has of the folder.
"""

import dataclasses
import json
import logging
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType

from ivegan import storage
from ivegan.config import flatten, from_dict
from ivegan.errors import UserError, public
from ivegan.storage.digest import digest
from ivegan.storage.schema import DamagedError, read
from pipelines import record as records
from pipelines.paths import tracking_uri
from pipelines.record import RunRecord
from pipelines.tracking import client as tracking
from pipelines.tracking import journals

log = logging.getLogger(__name__)

_INTERVAL, _LONGEST_PAUSE, _LAST_CHANCE = 3.0, 30.0, 20.0  # seconds
_COPIED = re.compile(
    r"(metrics/\d[^/]*\.jsonl|figures/\w[^/]*\.png|evaluation-\d+/\w[^/]*|sweep\.(html|png))"
)
NOTE = "mlflow.json"
_PARENT, _ENDED = "mlflow.parentRunId", "ended"


@dataclass(frozen=True)
class _Note:
    """What ``mlflow.json`` holds: the MLflow run, and what it has of the folder."""

    tracking_uri: str = ""
    run_id: str = ""
    record: str = ""
    """Digest of the run's record."""
    files: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, run_uri: str) -> "_Note":
        where = storage.join(run_uri, NOTE)
        try:
            return read(storage.read_bytes(where), cls, where) if storage.exists(where) else cls()
        except DamagedError:
            return cls()

    def write(self, run_uri: str) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2)
        storage.write_bytes(storage.join(run_uri, NOTE), text.encode())

    def lacks(self, names: list[str], state: str) -> list[str] | None:
        """Return the files that are not copied; None if the record is neither."""
        new = [name for name in names if name not in self.files]
        return new if new or state != self.record else None


def mirror(run_uri: str, uri: str) -> int:
    """Copy to MLflow what it lacks of a run, and return how many files that were.

    A run that was deleted in MLflow stays deleted.

    Args:
        run_uri: ``STORAGE/RUN_ID``.
        uri: of the tracking store.

    Raises:
        MlflowException, OSError, UserError: a server does not answer; what is missing is copied by
            the next call.
    """
    record, names, note = records.read_record(run_uri), _files(run_uri), _Note.read(run_uri)
    state = digest(dataclasses.asdict(record))
    if note.tracking_uri == public(uri) and note.lacks(names, state) is None:
        return 0
    tracked = tracking.client(uri)
    run_id = _run_of(tracked, record, run_uri, uri)
    if run_id is None:
        return 0
    existing = note.files if run_id == note.run_id else []
    if not existing or state != note.record:
        _write_settings(tracked, run_id, record, run_uri)
    new = [name for name in names if name not in existing]
    _copy_points(tracked, run_id, run_uri, [name for name in new if name.endswith(".jsonl")])
    _copy_artifacts(tracked, run_id, run_uri, [n for n in new if not n.endswith(".jsonl")])
    _copy_status(tracked, run_id, record)
    _Note(public(uri), run_id, state, names).write(run_uri)
    return len(new)


def store_of(run_uri: str, default: str = "") -> str:
    """Return the store that a run is mirrored to, with the password that no file holds."""
    return tracking_uri(_Note.read(run_uri).tracking_uri or default)


def run_id_of(run_uri: str) -> str:
    """Return the MLflow id of a run; its key as long as there is none."""
    return _Note.read(run_uri).run_id or records.read_record(run_uri).key


def _files(run_uri: str) -> list[str]:
    """Return the names of a run's files that MLflow gets; of evaluations, those of the newest."""
    names = sorted(name for name in storage.list_files(run_uri) if _COPIED.fullmatch(name))
    folders = [name.partition("/")[0] for name in names if name.startswith("evaluation-")]
    newest = max(folders, default="")
    return [n for n in names if not n.startswith("evaluation-") or n.startswith(f"{newest}/")]


def _run_of(tracked: MlflowClient, record: RunRecord, run_uri: str, uri: str) -> str | None:
    """Return the id of the run's MLflow run, made if there is none; None if it was deleted."""
    note = _Note.read(run_uri)
    if note.run_id and note.tracking_uri == public(uri):
        run = tracking.get_run(tracked, note.run_id)
        if run is not None and run.info.lifecycle_stage == "active":
            return note.run_id
    found = _search(tracked, record.key)
    if not found:
        if record.schema == 0:  # its journal begins it
            return None
        tracked.create_run(
            tracking.experiment_of(tracked, record.experiment, uri),
            run_name=record.run_id,
            start_time=record.started,
            tags={tracking.KEY: record.key, **_parent_tag(tracked, record, run_uri, uri)},
        )
        found = _search(tracked, record.key)  # another mirror may have made one at once
    active = [run for run in found if run.info.lifecycle_stage == "active"]
    active.sort(key=lambda run: (run.info.start_time, run.info.run_id))
    for run in active[1:]:
        tracked.delete_run(run.info.run_id)
    return active[0].info.run_id if active else None


def _search(tracked: MlflowClient, key: str) -> list[Any]:
    """Return the runs of a key, deleted ones included."""
    everywhere = [e.experiment_id for e in tracked.search_experiments(ViewType.ALL)]
    if not everywhere:
        return []
    return list(tracked.search_runs(everywhere, f"tags.{tracking.KEY} = '{key}'", ViewType.ALL))


def _parent_tag(tracked: MlflowClient, record: RunRecord, run_uri: str, uri: str) -> dict[str, str]:
    """Return the tag that nests a run; the run above it is made first."""
    parent = record.parent
    if parent is None:
        return {}
    if tracking.is_id(parent):
        return {_PARENT: parent}
    above = storage.join(run_uri.rpartition("/")[0], parent)
    if records.exists(above):
        run_id = _run_of(tracked, records.read_record(above), above, uri)
        run_id = run_id or _Note.read(above).run_id
    elif (run_id := tracking.find_run(tracked, parent)) is None:
        raise UserError(f"the run {parent} has to come first")
    return {_PARENT: run_id} if run_id else {}


def _write_settings(tracked: MlflowClient, run_id: str, record: RunRecord, run_uri: str) -> None:
    """Write parameters, data set and configuration, as far as they are missing."""
    config = from_dict(record.config)
    params = {k: v for k, v in flatten(config).items() if f"space.{k}" not in record.params}
    params |= record.params
    if record.kind == "train":
        params |= {"threads": record.threads, "stream": record.stream, "compile": record.compile}
        params |= {"precision": record.precision, "accumulate": record.micro_batches}
    existing = tracked.get_run(run_id).data.params
    missing = [Param(k, str(v)) for k, v in params.items() if k not in existing]
    source = "tune.py" if record.kind == "sweep" or record.parent else "train.py"
    tags = {
        "preset": record.preset,
        "git_commit": record.git_commit,
        "config_hash": record.config_hash,
        "dataset_hash": record.dataset_hash,
        "checkpoints": run_uri,
        "mlflow.source.type": "JOB",
        "mlflow.source.name": source,
        "mlflow.user": tracking.user(),
    }
    tracked.log_batch(run_id, params=missing, tags=[RunTag(k, v) for k, v in tags.items()])
    place = json.dumps({"uri": record.data or config.dataset})
    data = Dataset(config.dataset, record.dataset_hash[:36], "ivegan", place)
    context = InputTag("mlflow.data.context", "training")
    tracked.log_inputs(run_id, datasets=[DatasetInput(data, [context])])
    tracked.log_dict(run_id, record.config, "config.json")


def _copy_points(tracked: MlflowClient, run_id: str, run_uri: str, names: list[str]) -> None:
    metrics = [
        Metric(key, value, point.time, point.images_seen)
        for point in records.sound_points(storage.join(run_uri, name) for name in names)
        for key, value in point.metrics.items()
    ]
    for start in range(0, len(metrics), 1000):  # MLflow's limit of one request
        tracked.log_batch(run_id, metrics=metrics[start : start + 1000])


def _copy_artifacts(tracked: MlflowClient, run_id: str, run_uri: str, names: list[str]) -> None:
    """Copy figures, and files of an evaluation with its numbers; leave out what is refused."""
    for name in names:
        if not storage.is_inside(run_uri, name):
            log.warning("%s leads out of %s: left out", name, run_uri)
            continue
        content = storage.read_bytes(storage.join(run_uri, name))
        if name.endswith("/metrics.json"):
            _copy_evaluation(tracked, run_id, name, storage.join(run_uri, name))
        folder = "figures" if name.startswith("figures/") else "evaluation"
        with TemporaryDirectory() as tmp:
            path = Path(tmp, PurePosixPath(name).name)
            path.write_bytes(content)
            try:
                tracked.log_artifact(run_id, str(path), folder)
            except tracking.TROUBLE as error:
                if not tracking.is_refused(error):
                    raise
                reason = tracking.first_line(error)
                log.warning("MLflow refuses %s of run %s (%s): left out", name, run_id, reason)


def _copy_evaluation(tracked: MlflowClient, run_id: str, name: str, uri: str) -> None:
    """Copy an evaluation's numbers; evaluated again, a checkpoint gets no second point."""
    found, existing = records.sound_evaluation(uri), tracked.get_run(run_id).data.metrics
    if found is None:
        return
    images_seen = int(name.partition("/")[0].rpartition("-")[2])
    metrics = []
    for key, value in found.metrics.items():
        history = tracked.get_metric_history(run_id, key) if key in existing else []
        if all(point.step != images_seen for point in history):
            metrics.append(Metric(key, value, records.now(), images_seen))
    tracked.log_batch(run_id, metrics=metrics)


def _copy_status(tracked: MlflowClient, run_id: str, record: RunRecord) -> None:
    """Bring tags and status up to date."""
    run = tracked.get_run(run_id)
    tags = [RunTag(k, v) for k, v in record.tags.items() if run.data.tags.get(k) != v]
    if tags:
        tracked.log_batch(run_id, tags=tags)
    if _ENDED in run.data.tags and _ENDED not in record.tags:
        tracked.delete_tag(run_id, _ENDED)
    if record.status in records.ENDED:
        tracked.set_terminated(run_id, record.status, record.ended)
    elif record.status == "RUNNING" and run.info.status != "RUNNING":
        tracked.update_run(run_id, status="RUNNING")


class Mirror:
    """Mirrors a run every few seconds, in a thread that training never waits for."""

    def __init__(self, run_uri: str, uri: str) -> None:
        self._run_uri, self._uri = run_uri, uri
        folder = run_uri.rpartition("/")[0]
        self._remedy = f"`python pipelines/registry.py sync --storage {folder}` copies the rest."
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Copy the rest, in about twenty seconds; what MLflow does not take is left to ``sync``."""
        self._done.set()
        self._thread.join(_LAST_CHANCE)
        if self._thread.is_alive():
            log.warning("MLflow did not take all in %g s; %s", _LAST_CHANCE, self._remedy)

    def _run(self) -> None:
        failures = 0
        while True:
            done = self._done.is_set()
            try:
                mirror(self._run_uri, self._uri)
                failures = 0
            except Exception as error:  # of any kind: training is worth more
                reason = tracking.first_line(error)
                if done:
                    log.warning(
                        "MLflow lacks a part of %s (%s); %s", self._run_uri, reason, self._remedy
                    )
                elif not failures:
                    answer = "does not answer" if tracking.is_away(error) else "refuses the run"
                    log.warning("MLflow %s (%s); training continues", answer, reason)
                failures += 1
            if done:
                return
            self._done.wait(min(_INTERVAL * 2.0 ** min(failures, 9), _LONGEST_PAUSE))


def sync(where: str | Path) -> dict[str, int]:
    """Mirror all runs of a folder or bucket; return how many files of which run were copied.

    Runs whose driver died on this machine are recorded as KILLED. Journals of version 0.1, in the
    folders of its runs and in ``journal`` beside them, are delivered first.

    Raises:
        UserError: a server does not take a run; all others are copied nevertheless.
    """
    copied: dict[str, int] = {}
    pending, damaged = _pending(where)
    failure: UserError | None = next(iter(damaged), None)
    copies = [(folder, journals.deliver) for folder in _journal_folders(where)]
    copies += [(run_uri, _mirrored) for run_uri, *_ in pending]
    for place, copy in copies:
        try:
            copied |= copy(place)
        except tracking.TROUBLE as error:
            failure = failure or UserError(
                f"MLflow does not take all of {place} ({tracking.first_line(error)}): try sync "
                "again later."
            )
    if failure is not None:
        raise failure
    return copied


def _mirrored(run_uri: str) -> dict[str, int]:
    return {records.read_record(run_uri).run_id: mirror(run_uri, store_of(run_uri))}


def waiting(where: str | Path) -> dict[str, int]:
    """Return by run id how many files ``sync`` would copy; nothing is copied."""
    counts = {record.run_id: len(new) for _, record, new in _pending(where)[0]}
    for folder in _journal_folders(where):
        counts |= journals.waiting(folder)
    return counts


def _journal_folders(where: str | Path) -> list[str]:
    """Return the folders that may hold journals of version 0.1."""
    place = storage.absolute(where)
    beside = storage.join(place.rpartition("/")[0], "journal")
    return [folder for folder in (place, beside) if storage.exists(folder)]


def _pending(
    where: str | Path,
) -> tuple[list[tuple[str, RunRecord, list[str]]], list[DamagedError]]:
    """Return the runs of which MLflow lacks files, with these, and errors of damaged runs.

    Runs that others are nested under come first.
    """
    found, damaged = [], []
    for run_uri in records.list_runs(storage.absolute(where)):
        try:
            record = records.end_if_dead(run_uri, records.read_record(run_uri))
        except DamagedError as error:
            log.warning("%s", error)
            damaged.append(error)
            continue
        new = _Note.read(run_uri).lacks(_files(run_uri), digest(dataclasses.asdict(record)))
        if record.schema and new is not None:  # an older run's journal delivers it
            found.append((run_uri, record, new))
    return sorted(found, key=lambda one: one[1].parent is not None), damaged
