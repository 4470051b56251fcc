"""MLflow as a mirror of run folders: one idempotent function copies what MLflow lacks.

A run is found by its key, which is a tag. Points sent twice are one point, since MLflow drops equal
ones, so a copy may be cut anywhere and made again. ``mlflow.json`` in the run's folder names the
MLflow run and what it has of the folder.
"""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

from ivegan import storage
from ivegan.config import flatten, from_dict
from ivegan.errors import UserError, public
from ivegan.storage.digest import digest
from ivegan.storage.schema import DamagedError, read
from pipelines import record as records
from pipelines.background import repeated
from pipelines.paths import tracking_uri
from pipelines.record import RunRecord
from pipelines.tracking import client as tracking
from pipelines.tracking import journals

log = logging.getLogger(__name__)

_INTERVAL, _LAST_CHANCE = 3.0, 20.0  # seconds
_COPIED = re.compile(
    r"(metrics/\d[^/]*\.jsonl|figures/\w[^/]*\.png|evaluation-\d+/\w[^/]*|sweep\.(html|png))"
)
NOTE = "mlflow.json"
_Counts = dict[str, int]


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
        """Return the files that MLflow lacks; None if it has everything, the record included."""
        new = [name for name in names if name not in self.files]
        return new if new or state != self.record else None


def mirror(run_uri: str, uri: str) -> int:
    """Copy to MLflow what it lacks of a run, and return how many files that were.

    A run that was deleted in MLflow stays deleted.

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
    if run_id != note.run_id:
        note = _Note()
    if state != note.record:
        _write_settings(tracked, run_id, record, run_uri)
    new = [name for name in names if name not in note.files]
    _copy_points(tracked, run_id, run_uri, [name for name in new if name.endswith(".jsonl")])
    for name in new:
        if name.endswith("/metrics.json"):
            _copy_evaluation(tracked, run_id, storage.join(run_uri, name))
        if not name.endswith(".jsonl"):
            folder = "figures" if name.startswith("figures/") else "evaluation"
            tracking.log_file(tracked, run_id, run_uri, name, folder)
    if record.status in records.ENDED:
        tracked.set_terminated(run_id, record.status, record.ended)
    elif record.status == "RUNNING":
        tracked.update_run(run_id, status="RUNNING")
    _Note(public(uri), run_id, state, names).write(run_uri)
    return len(new)


def mirror_or_warn(run_uri: str, uri: str, what: str) -> None:
    """Mirror a run; where MLflow does not take it, log what it lacks."""
    try:
        mirror(run_uri, uri)
    except tracking.TROUBLE as error:
        reason = tracking.first_line(error)
        log.warning("MLflow lacks %s (%s); %s copies it.", what, reason, _sync_of(run_uri))


def _sync_of(run_uri: str) -> str:
    """Return the command that copies what MLflow lacks of the runs beside this one."""
    return f"`python pipelines/registry.py sync --storage {run_uri.rpartition('/')[0]}`"


def forget(run_uri: str, folder: str) -> None:
    """Let the next mirror copy a folder of a run once more, because its files have changed."""
    note = _Note.read(run_uri)
    below = f"{folder.rpartition('/')[2]}/"
    files = [name for name in note.files if not name.startswith(below)]
    if files != note.files:
        dataclasses.replace(note, files=files).write(run_uri)


def store_of(run_uri: str, default: str = "") -> str:
    """Return the store that a run is mirrored to.

    Args:
        run_uri: the run's folder.
        default: the store where ``mlflow.json`` names none.
    """
    return tracking_uri(_Note.read(run_uri).tracking_uri or default)


def run_id_of(run_uri: str) -> str:
    """Return the MLflow id of a run, or its key where it has not been mirrored yet."""
    return _Note.read(run_uri).run_id or records.read_record(run_uri).key


def _files(run_uri: str) -> list[str]:
    """Return the names of a run's files that MLflow gets; of evaluations, those of the newest."""
    names = sorted(name for name in storage.list_files(run_uri) if _COPIED.fullmatch(name))
    folders = [name.partition("/")[0] for name in names if name.startswith("evaluation-")]
    newest = max(folders, default="")
    return [n for n in names if not n.startswith("evaluation-") or n.startswith(f"{newest}/")]


def _run_of(tracked: MlflowClient, record: RunRecord, run_uri: str, uri: str) -> str | None:
    """Return the id of the run's MLflow run, made if there is none; None if it was deleted."""
    found = tracking.runs_of(tracked, record.key)
    if not found and record.schema:  # an older run's journal begins it
        tracked.create_run(
            tracking.experiment_of(tracked, record.experiment, uri),
            run_name=record.run_id,
            start_time=record.started,
            tags={tracking.KEY: record.key, **_parent_tag(tracked, record, run_uri, uri)},
        )
        found = tracking.runs_of(tracked, record.key)  # another mirror may have made one at once
    active = sorted(run.info.run_id for run in found if run.info.lifecycle_stage == "active")
    for run_id in active[1:]:
        tracked.delete_run(run_id)
    return active[0] if active else None


def _parent_tag(tracked: MlflowClient, record: RunRecord, run_uri: str, uri: str) -> dict[str, str]:
    """Return the tag that nests a run; the run above it is made first."""
    if record.parent is None:
        return {}
    above = storage.join(run_uri.rpartition("/")[0], record.parent)
    if records.exists(above):
        run_id = _run_of(tracked, records.read_record(above), above, uri)
    else:
        run_id = tracking.find_run(tracked, record.parent)
    return {"mlflow.parentRunId": run_id} if run_id else {}


def _write_settings(tracked: MlflowClient, run_id: str, record: RunRecord, run_uri: str) -> None:
    """Write parameters, data set and configuration, as far as they are missing."""
    config = from_dict(record.config)
    params = {k: v for k, v in flatten(config).items() if f"space.{k}" not in record.params}
    params |= record.params
    if record.kind == "train":
        params |= {name: getattr(record, name) for name in ("threads", *records.HOW)}
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
        **record.tags,
    }
    before = tracking.log_settings(tracked, run_id, params, tags)
    if "ended" in before.data.tags and "ended" not in record.tags:  # resumed
        tracked.delete_tag(run_id, "ended")
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


def _copy_evaluation(tracked: MlflowClient, run_id: str, uri: str) -> None:
    """Copy an evaluation's numbers; where MLflow has one of this checkpoint, those that differ."""
    if (found := records.sound_evaluation(uri)) is not None:
        images_seen = int(uri.rpartition("/")[0].rpartition("-")[2])
        history = tracked.get_metric_history(run_id, next(iter(found.metrics), "eval/"))
        again = images_seen in [point.step for point in history]
        old = tracked.get_run(run_id).data.metrics if again else {}
        new = [(k, v) for k, v in found.metrics.items() if old.get(k) != v]
        metrics = [Metric(k, v, records.now(), images_seen) for k, v in new]
        tracked.log_batch(run_id, metrics=metrics)


@contextlib.contextmanager
def mirrored(run_uri: str, uri: str) -> Iterator[None]:
    """Mirror a run every few seconds while the block runs, in a thread that it never waits for.

    At the end the rest is copied, in about twenty seconds; what MLflow does not take is left to
    ``sync``.
    """
    reason, ended = "", False

    def copy() -> None:
        nonlocal reason
        first, reason = not reason, f"no answer in {_LAST_CHANCE:g} s"
        try:
            mirror(run_uri, uri)
            reason = ""
        except Exception as error:  # of any kind: training is worth more
            reason = tracking.first_line(error)
            if first and not ended:
                log.warning("MLflow does not take the run (%s); training continues", reason)

    try:
        with repeated(copy, _INTERVAL, "mirror", last=True, patience=_LAST_CHANCE):
            try:
                yield
            finally:
                ended = True
    finally:
        if reason:
            sentence = "MLflow lacks a part of %s (%s); %s copies the rest."
            log.warning(sentence, run_uri, reason, _sync_of(run_uri))


def sync(where: str | Path) -> dict[str, int]:
    """Mirror all runs of a folder or bucket; return how many files of which run were copied.

    Runs whose driver died on this machine are recorded as KILLED. Journals of version 0.1, in the
    folders of its runs and in ``journal`` beside them, are delivered first.

    Raises:
        UserError: a record is damaged or a server does not take a run; all others are copied.
    """
    copied, failures = _of_all(where, journals.deliver, _copied)
    for failure in failures[1:]:
        log.warning("%s", failure)
    if failures:
        raise failures[0]
    return copied


def waiting(where: str | Path) -> dict[str, int]:
    """Return by run id how many files ``sync`` would copy; nothing is copied."""
    counts, failures = _of_all(where, journals.waiting, _waiting)
    for failure in failures:
        log.warning("%s", failure)
    return counts


def _of_all(
    where: str | Path, of_journals: Callable[[str], _Counts], of_run: Callable[[str], _Counts]
) -> tuple[_Counts, list[UserError]]:
    """Return what two functions count in folders of journals and of runs, and what fails."""
    place = storage.absolute(where)
    folders = (place, storage.join(place.rpartition("/")[0], "journal"))
    parts = [(of_journals, folder) for folder in folders if storage.exists(folder)]
    parts += [(of_run, run_uri) for run_uri in records.list_runs(place)]
    counts: _Counts = {}
    failures: list[UserError] = []
    for count, part in parts:
        try:
            counts |= count(part)
        except DamagedError as error:
            failures.append(error)
        except tracking.TROUBLE as error:
            reason = tracking.first_line(error)
            failures.append(
                UserError(f"MLflow does not take all of {part} ({reason}): try sync again later.")
            )
    return counts, failures


def _copied(run_uri: str) -> _Counts:
    before = records.read_record(run_uri)
    if (record := records.ended_if_dead(before)) != before:
        records.write_record(run_uri, record)
    return {run_id: mirror(run_uri, store_of(run_uri)) for run_id in _lacking(run_uri, record)}


def _waiting(run_uri: str) -> _Counts:
    return _lacking(run_uri, records.ended_if_dead(records.read_record(run_uri)))


def _lacking(run_uri: str, record: RunRecord) -> _Counts:
    """Return how many files of a run MLflow lacks, under its id; empty where it has all."""
    new = _Note.read(run_uri).lacks(_files(run_uri), digest(dataclasses.asdict(record)))
    # An older run's journal delivers it.
    return {} if new is None or record.schema == 0 else {record.run_id: len(new)}
