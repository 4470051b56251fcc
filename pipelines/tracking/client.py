"""MLflow runs: started and ended by a driver, fed from a thread that training never waits for.

All that a run has to say is written to a journal first, then copied into the run's folder in
storage, and only then sent, always with the same step, value and time. So a point sent twice is one
point (MLflow keeps one of several equal ones), and a run that goes on after its node was lost knows
what was sent. What an outage held back stays in the journal, and ``deliver`` brings it later.

A run has a key of ours, which is a tag of its MLflow run: so one that begins during an outage gets
its MLflow run afterwards, and only one.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import sqlite3
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from ivegan import storage
from ivegan.errors import UserError
from pipelines.paths import public
from pipelines.training import record as records

log = logging.getLogger(__name__)

_BATCH = 100  # points of the journal in one request
_LONGEST_PAUSE = 30.0  # seconds between two attempts
_LAST_CHANCE = 20.0  # seconds that the end of a run waits for the server
_NAME = "journal"  # of the copy in a run's folder
_EVALUATION = "evaluation-"  # and images seen: where an evaluation's journal is kept
# All that MLflow raises of servers; where artifacts go to S3 directly, boto3's errors come through.
_TROUBLE_OF_MLFLOW = (MlflowException, OSError, Boto3Error, BotoCoreError, ClientError)
TROUBLE = (*_TROUBLE_OF_MLFLOW, UserError)
_ENDED = "ended"  # the tag that says why a nested run was stopped from outside
_BUSY = (408, 409, 425, 429)  # the statuses below 500 after which a request is made again
_KEY = "run_key"  # the tag by which a run is found again

DESCRIPTIONS = {
    "ring": "Eight Gaussians on a ring: does IVE-GAN find all of them, equally often? (Fig. 2)",
    "grid": "Twenty-five Gaussians on a grid: does IVE-GAN find all of them, equally often?",
    "digits": "Scikit-learn's 1,797 handwritten digits, 16x16: a demonstration, minutes on a CPU.",
    "mnist": "MNIST, 32x32: samples, reconstructions and the latent space. (Figs. 3 to 5)",
    "celeba": "CelebA, 128x128: samples, variations, attributes, interpolation. (Figs. 6 to 9)",
}


def client(uri: str) -> MlflowClient:
    """Return a client that says little and gives up on a dead server within a minute.

    Raises:
        UserError: the store cannot be opened.
    """
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print a password in the URL
        **storage.environment(),
    }.items():
        os.environ.setdefault(name, value)
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    path = _sqlite_path(uri)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA user_version")
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"The MLflow store {path} cannot be opened ({error}); set MLFLOW_TRACKING_URI."
            ) from error
    mlflow.set_tracking_uri(uri)
    return MlflowClient(uri)


def check(uri: str) -> None:
    """Return if a tracking store answers.

    Raises:
        UserError: none does; nothing should begin before this is mended.
    """
    try:
        client(uri).search_experiments(max_results=1)
    except _TROUBLE_OF_MLFLOW as error:
        raise refusal(uri, error) from error


def new_key(run_name: str) -> str:
    """Return a key for a new run, unlike any other."""
    return f"{run_name}-{uuid.uuid4().hex[:12]}"


def start_run(
    uri: str,
    *,
    experiment: str,
    run_name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    config: Mapping[str, Any],
    dataset: tuple[str, str, str],
    parent_run_id: str | None = None,
    run_id: str | None = None,
    journal: "Journal | None" = None,
) -> str:
    """Return the id of a new MLflow run, or of an earlier start of the same run, which runs again.

    With a journal an outage is logged, never raised: then the run's key is returned in place of an
    id, and the MLflow run is made when the store is back.

    Args:
        uri: of the tracking store.
        experiment: made, with a description, if it is not there.
        run_name: as people see it.
        params: dotted names and values.
        tags: of the run.
        config: kept as ``config.json``.
        dataset: name, digest and where it lies, for MLflow's dataset input.
        parent_run_id: run to nest this one under.
        run_id: of an earlier start of the same run, where there is no journal.
        journal: of the run.

    Raises:
        UserError: no tracking store answers, and there is neither a journal nor a run id.
    """
    script = "tune.py" if parent_run_id is not None else Path(sys.argv[0]).name  # not Ray's worker
    source = {"mlflow.source.type": "JOB", "mlflow.source.name": script}
    start = {
        "experiment": experiment,
        "run_name": run_name,
        "params": {name: str(value) for name, value in params.items()},
        "tags": {**note_of(params), **tags, **source, "mlflow.user": user()},
        "config": dict(config),
        "dataset": dataset,
        "parent": parent_run_id,
    }
    if journal is not None:
        journal.add({"status": "RUNNING"} if journal.begun else {"start": start})
        try:
            journal.keep()
            journal.send()
        except TROUBLE as error:
            log.warning("MLflow does not answer (%s); %s goes on", first_line(error), run_name)
        return journal.run_id
    try:
        tracked = client(uri)
        if run_id is not None and find_run(tracked, run_id) is not None:
            tracked.update_run(run_id, status="RUNNING")
            return run_id
        new = _create(tracked, uri, start, {})
        _complete(tracked, new, start)
    except _TROUBLE_OF_MLFLOW as error:
        if run_id is not None:
            log.warning("MLflow does not answer (%s); run %s goes on", first_line(error), run_id)
            return run_id
        raise refusal(uri, error) from error
    return new


def end_run(uri: str, run_id: str, status: str, journal: "Journal | None" = None) -> None:
    """End a run as FINISHED, FAILED or KILLED; an outage is logged, never raised.

    Args:
        uri: of the tracking store.
        run_id: of the run.
        status: one of the three.
        journal: of the run, delivered as far as the store takes it, this end included.
    """
    try:
        if journal is None:
            client(uri).set_terminated(run_id, status)
        else:
            journal.add({"status": status})
            journal.send_all()
    except TROUBLE as error:
        left = journal.unsent if journal is not None else 1
        log.warning(
            "MLflow did not take %d entries of run %s, the last of them that it is %s (%s)%s",
            left,
            run_id,
            status,
            first_line(error),
            "; `python pipelines/registry.py sync` brings them." if journal is not None else "",
        )


def add_report(
    journal: "Journal", metrics: Mapping[str, float], images_seen: int, folder: Path
) -> None:
    """Write an evaluation's numbers and files into a run's journal, but for those that it holds.

    Trouble is logged, never raised: the report is on disk.
    """
    finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
    try:
        journal.add_metrics(finite, images_seen)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = f"evaluation/{path.relative_to(folder).as_posix()}"
            journal.add_file(name, path.read_bytes())
    except (OSError, UserError) as error:
        told = (public(journal.uri), journal.run_id, first_line(error))
        log.warning("%s will not have all of %s: %s", *told)


def add_evaluation(
    uri: str,
    run_id: str,
    metrics: Mapping[str, float],
    images_seen: int,
    folder: Path,
    *,
    journals: Path,
    run_uri: str,
) -> bool:
    """Put an evaluation's numbers and files under a run that ended; return whether MLflow has them.

    An outage is logged, never raised. All goes through a journal of its own, for ``deliver`` to
    bring; and so a checkpoint that is evaluated again, be it on another node, adds no second point.

    Args:
        uri: of the tracking store.
        run_id: MLflow's, or the run's key.
        metrics: under their full names.
        images_seen: by the checkpoint.
        folder: with the report and its pictures.
        journals: folder of journals.
        run_uri: the run's folder in storage, where a copy is kept, if it can be written.
    """
    name = f"{_EVALUATION}{images_seen:010d}"
    path = journals / f"{run_uri.rpartition('/')[2]}.{name}.jsonl"
    try:
        with contextlib.suppress(*_TROUBLE_OF_MLFLOW):  # away, so it may have the run
            # One that began in an outage has only a key, and may wait in its own journal.
            if is_id(run_id) and find_run(client(uri), run_id) is None:
                return False
        journal = Journal.open(path, uri, run_id, storage.join(run_uri, name))
        add_report(journal, metrics, images_seen, folder)
        try:
            journal.keep()
        except storage.Unavailable:
            raise
        except UserError:  # it is the folder of somebody else's run
            journal = Journal.open(path, uri, run_id)
        journal.send_all()
    except TROUBLE as error:
        log.warning(
            "MLflow did not take all of the evaluation of run %s (%s); "
            "`python pipelines/registry.py sync` brings the rest.",
            run_id,
            first_line(error),
        )
        return False
    return True


def end_children(
    uri: str,
    parent_run_id: str,
    note: str,
    journal: "Journal | None" = None,
    children: Sequence[str] = (),
) -> int:
    """End the nested runs whose processes were stopped from outside; return how many there were.

    Args:
        uri: of the tracking store.
        parent_run_id: of the run that they are nested under.
        note: becomes their tag ``ended``.
        journal: of the parent, where this is only written down, for its end to do; returned is 0.
        children: folders of the nested runs in storage; what their journals hold is sent before.
    """
    if journal is not None:
        journal.add({"end_children": note, "children": list(children)})
        return 0
    tracked = client(uri)
    experiment = tracked.get_run(parent_run_id).info.experiment_id
    nested = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    left = [
        run.info.run_id
        for run in tracked.search_runs([experiment], nested, max_results=5000)
        if run.info.status == "RUNNING"
    ]
    for run_id in left:
        _end_from_outside(tracked, run_id, note)
    return len(left)


def _end_trials(uri: str, children: Sequence[str], note: str) -> None:
    from pipelines.tracking.mirror import mirror

    for child in children:
        if records.exists(child):
            if records.read_record(child).status == "RUNNING":
                records.end_record(child, "KILLED", ended=note)
            mirror(child, uri)


def end_stopped(run_uri: str, note: str) -> None:
    """Record that a run was stopped from outside, unless it had finished."""
    if records.exists(run_uri) and records.read_record(run_uri).status in ("RUNNING", "KILLED"):
        records.end_record(run_uri, "KILLED", ended=note)


def _end_from_outside(tracked: MlflowClient, run_id: str, note: str) -> None:
    tracked.log_batch(run_id, tags=[RunTag(_ENDED, note)])
    tracked.set_terminated(run_id, "KILLED")


def set_tags(
    uri: str, run_id: str, tags: Mapping[str, str], journal: "Journal | None" = None
) -> None:
    """Add tags to a run; with its journal they are only written down, for its end to deliver."""
    if journal is not None:
        journal.add({"tags": dict(tags)})
    else:
        client(uri).log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])


@contextlib.contextmanager
def system_metrics(tracker: "Tracker") -> Iterator[None]:
    """Log this machine's load to a run while the block runs, if that can be had."""
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    done = threading.Event()

    def watch() -> None:
        # MLflow's own thread would end with the first answer that does not come.
        try:
            load = SystemMetricsMonitor("", resume_logging=False)
            while not done.wait(load.sampling_interval):
                load.collect_metrics()
                tracker.log_next({f"system/{k}": v for k, v in load.aggregate_metrics().items()})
                for monitor in load.monitors:
                    monitor.clear_metrics()
        except Exception as error:  # whatever is wrong with it, training is worth more
            log.warning("No system metrics: %s", first_line(error))

    thread = threading.Thread(target=watch, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Tracker:
    """Feeds one run with metrics and figures, in the background.

    Nothing here waits for MLflow or for storage, or raises for their sake. Neither does a full disk
    stop anybody.
    """

    def __init__(self, journal: "Journal") -> None:
        self._journal = journal
        self._writing = threading.Lock()
        self._told = False
        self._sender = _Courier(
            journal.send, lambda: journal.ready, "MLflow does not answer (%s); training goes on"
        )
        self._keeper = _Courier(
            self._keep,
            lambda: journal.unkept,
            "The journal cannot be copied into storage (%s); training goes on",
            rest=10,
        )

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Note metrics at a number of images seen; what was noted before stays as it was."""
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._note(lambda: self._journal.add_metrics(finite, images_seen))

    def log_next(self, metrics: Mapping[str, float]) -> None:
        """Note metrics that are counted by themselves, at the step after their last."""
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._note(lambda: self._journal.add_metrics(finite, self._journal.step_after(finite)))

    def figure(self, name: str, png: bytes, images_seen: int) -> None:
        """Note a figure; MLflow shows those of one name in their order."""
        path = f"figures/{name}-{images_seen:010d}.png"
        self._note(lambda: self._journal.add_file(path, png))

    def close(self) -> None:
        """Wait a little for what is not sent yet; the rest stays in the journal."""
        self._keeper.close()
        self._sender.close()

    def _keep(self) -> None:
        self._journal.keep()
        self._sender.wake()

    def _note(self, write: Callable[[], None]) -> None:
        with self._writing:
            try:
                write()
            except (OSError, UserError) as error:
                if not self._told:
                    log.warning("The journal cannot be written (%s); training goes on", error)
                self._told = True
        self._keeper.wake()
        self._sender.wake()


class _Courier:
    """Does a piece of work in a thread as long as something is left, and again where it failed."""

    def __init__(
        self, work: Callable[[], None], left: Callable[[], int], failing: str, rest: float = 0
    ) -> None:
        self._work, self._left, self._failing, self._rest = work, left, failing, rest
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(_LAST_CHANCE + 60)

    def _run(self) -> None:
        pause, failures, last_chance = 0.0, 0, math.inf
        while True:
            with self._changed:
                if pause:
                    self._changed.wait_for(lambda: self._closing, timeout=pause)
                self._changed.wait_for(lambda: self._closing or self._left())
                if self._closing and last_chance == math.inf:
                    last_chance = time.monotonic() + _LAST_CHANCE
                if self._closing and not self._left():
                    return
            began = time.monotonic()
            try:
                self._work()
                failures = 0
                pause = self._rest * (time.monotonic() - began)
            except Exception as error:  # of any kind: this thread must live on
                if not failures:
                    log.warning(self._failing, first_line(error))
                failures += 1
                pause = min(_LONGEST_PAUSE, 2.0 ** min(failures - 1, 9))
                if time.monotonic() >= last_chance:
                    return
                if self._closing:
                    threading.Event().wait(min(pause, 2.0))


@dataclass
class _Copy:
    """What lies at one of a journal's two places."""

    header: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)
    run_id: str | None = None
    sent: int = 0

    @classmethod
    def read(cls, stem: str, key: str | None = None) -> "_Copy | None":
        """Return a journal as far as its lines are whole; None where there is none of the key."""
        if not storage.exists(f"{stem}.jsonl"):
            return None
        found: list[dict[str, Any]] = []
        for line in storage.read_bytes(f"{stem}.jsonl").decode(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # the process was killed while it wrote
                break
        if not found or _KEY not in found[0] or key not in (None, found[0][_KEY]):
            return None
        copy = cls(found[0], found[1:])
        if storage.exists(f"{stem}.sent"):
            copy.run_id, copy.sent = _told_sent(storage.read_bytes(f"{stem}.sent"))
        return copy


class Journal:
    """All that a run had to say, in a file here and in a copy in the run's folder in storage.

    One JSON object a line: a header, then what MLflow is to be told, in order: the run's start,
    points, files, tags, statuses. Beside it ``.sent`` tells the id of the MLflow run and how many
    entries it has; it may lag behind, since entries can be sent twice. Files lie in a folder of the
    journal's name.

    Nothing is sent that the copy does not hold. So where the two differ, the copy is right: what it
    lacks no MLflow has seen, and a run that goes on says it anew.
    """

    def __init__(self, path: Path, uri: str, key: str, kept: str | None) -> None:
        """Take up what is there of this key; ``open`` and ``stored`` are the ways to get here."""
        self.path, self.uri, self.key = path, uri, key
        self._far = None if kept is None else storage.join(kept, _NAME)
        here = _Copy.read(self._stem, key)
        copy = None if self._far is None else _Copy.read(self._far, key)
        used = here or copy or _Copy({})
        if copy is not None and used.entries[: len(copy.entries)] != copy.entries:
            used = copy
        self._entries = used.entries
        ends = [(c.sent, c.run_id) for c in (used, copy) if c is not None and c.run_id]
        self._sent, self._run_id = max(ends, default=(0, None))
        self._found = False
        self._copied = len(copy.entries) if copy is not None else 0
        self._points = {(k, e["step"]) for e in used.entries for k in e.get("metrics", {})}
        self._files = {e["file"] for e in used.entries if "file" in e}

    @classmethod
    def open(cls, path: Path, uri: str, key: str, kept: str | None = None) -> "Journal":
        """Return a run's journal for writing; another run's of the same name is put aside.

        Args:
            path: of the file here.
            uri: of the tracking store.
            key: of the run, or the id of an MLflow run that exists.
            kept: the run's folder in storage, where the copy goes.

        Raises:
            UserError: one of the two places cannot be used.
        """
        there = _Copy.read(str(path.with_suffix("")))
        if there is not None and there.header[_KEY] != key:
            aside = path.with_name(f"{path.stem}.{there.header[_KEY]}.jsonl")
            for suffix in (".jsonl", ".sent", ""):
                if path.with_suffix(suffix).exists():
                    path.with_suffix(suffix).replace(aside.with_suffix(suffix))
        journal = cls(path, uri, key, kept)
        # Written anew, since the last line of a process that was killed may be cut.
        storage.write_bytes(path, journal._lines(journal._entries))
        return journal

    @classmethod
    def stored(cls, path: Path, kept: str | None = None) -> "Journal | None":
        """Return a journal as it lies there, to deliver it; its run may still be writing.

        Args:
            path: of the file here, which may be missing if there is a copy.
            kept: the run's folder in storage; where there is a file here, that is named in it.
        """
        found = _Copy.read(str(path.with_suffix("")))
        if found is not None:
            kept = found.header.get("kept")
        elif kept is not None:
            found = _Copy.read(storage.join(kept, _NAME))
        if found is None:
            return None
        if kept is not None and storage.join(kept, _NAME) == str(path.with_suffix("")):
            kept = None  # this is the copy
        told, key = found.header["uri"], found.header[_KEY]
        here = os.environ.get("MLFLOW_TRACKING_URI", "")  # with the password that no file holds
        uri = here if public(here) == told else told
        try:
            return cls(path, uri, key, kept)
        except storage.Unavailable:
            raise  # what was sent from elsewhere is told there
        except UserError as error:
            log.warning("The journal %s is taken as it is: %s", path, error)
            return cls(path, uri, key, None)

    @property
    def run_id(self) -> str:
        """The id of the MLflow run, or the key as long as none is known."""
        return self._run_id or self.key

    @property
    def begun(self) -> bool:
        """Whether an earlier start of the run is written down."""
        return any("start" in entry for entry in self._entries)

    @property
    def nested(self) -> bool:
        """Whether the run belongs below another one."""
        return any(entry.get("start", {}).get("parent") for entry in self._entries)

    @property
    def unsent(self) -> int:
        """How many entries are not delivered."""
        return max(0, len(self._entries) - self._sent)

    @property
    def unkept(self) -> int:
        """How many entries the copy lacks."""
        return len(self._entries) - self._copied if self._far is not None else 0

    @property
    def ready(self) -> int:
        """How many entries may be sent now."""
        return max(0, self.unsent - self.unkept)

    def step_after(self, metrics: Mapping[str, float]) -> int:
        """Return the step after the last one of these metrics."""
        return 1 + max((step for name, step in self._points if name in metrics), default=-1)

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write metrics down but for those of a step that is there: a resumed run repeats some."""
        fresh = {k: v for k, v in metrics.items() if (k, step) not in self._points}
        if fresh:
            self.add({"metrics": fresh, "step": step})
            self._points |= {(k, step) for k in fresh}

    def add_file(self, name: str, content: bytes) -> None:
        """Keep a file beside the journal and write it down, unless it is there.

        Args:
            name: of the run's artifact, with its folders.
            content: of the file.
        """
        if name not in self._files:
            storage.write_bytes(self.path.with_suffix("") / name, content)
            self.add({"file": name})
            self._files.add(name)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write an entry down, with the time that it will have whenever it is sent.

        Raises:
            OSError: no line was written, not even a part of one.
        """
        stamped = {**entry, "timestamp": time.time_ns() // 1_000_000}
        line = (json.dumps(stamped) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(f"only a part of a line fits into {self.path}")
            except OSError:
                file.truncate(end)
                raise
        self._entries.append(stamped)

    def keep(self) -> None:
        """Bring the copy in storage up to date.

        Raises:
            UserError, OSError: the store does not take it; nothing is lost.
        """
        if self._far is None:
            return
        entries, sent = list(self._entries), self._sent
        if len(entries) > self._copied:
            for entry in entries[max(self._copied, sent) :]:
                file = self.path.with_suffix("") / entry.get("file", "")
                if "file" in entry and file.is_file():
                    storage.write_bytes(storage.join(self._far, entry["file"]), file.read_bytes())
            storage.write_bytes(f"{self._far}.jsonl", self._lines(entries))
            self._copied = len(entries)
        storage.write_bytes(f"{self._far}.sent", _tell_sent(self._run_id, sent))

    def send_all(self) -> None:
        """Deliver all entries, and note in the copy that they are delivered.

        Raises:
            MlflowException, OSError, UserError: server or store does not answer; nothing is lost.
        """
        if self.unkept:
            self.keep()
        while self.unsent:
            self.send()
        self.keep()

    def send(self) -> None:
        """Deliver the next entries, at most a batch of them; first of all, make the MLflow run.

        Raises:
            MlflowException, OSError, UserError: the server does not answer; nothing is lost.
        """
        tracked = client(self.uri)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".sent").open("a+b") as note:
            fcntl.flock(note, fcntl.LOCK_EX)  # a `sync` beside the run must not make a second run
            note.seek(0)
            run_id, sent = _told_sent(note.read())
            if run_id is not None and self._run_id in (None, run_id):
                self._run_id, self._sent = run_id, max(self._sent, sent)
            run_id = self._run_of_mlflow(tracked)
            part = self._entries[self._sent : self._sent + min(_BATCH, self.ready)]
            metrics = [
                Metric(key, value, entry["timestamp"], entry["step"])
                for entry in part
                for key, value in entry.get("metrics", {}).items()
            ]
            for start in range(0, len(metrics), 1000):  # MLflow's limit of one request
                self._tell_points(tracked, run_id, metrics[start : start + 1000])
            for entry in part:
                what = entry.get("file") or " and ".join(entry.keys() - {"timestamp"})
                with self._unless_refused(tracked, run_id, what):
                    self._tell(tracked, run_id, entry)
            self._sent += len(part)
            note.truncate(0)
            note.write(_tell_sent(run_id, self._sent))

    def _run_of_mlflow(self, tracked: MlflowClient) -> str:
        """Return the id of the MLflow run, made if the store has none of this key."""
        if not self._found or self._run_id is None:
            run_id = find_run(tracked, self.key)
            if run_id != self._run_id:
                self._sent = 0  # another store, or a run that somebody deleted: it gets all
            if run_id is None:
                begin = next((e for e in self._entries if "start" in e), None)
                if begin is None:
                    raise UserError(f"it has no run {self.key}; without it {self.path} can go")
                start = {**begin["start"], "timestamp": begin["timestamp"]}
                run_id = _create(tracked, self.uri, start, {_KEY: self.key})
            self._run_id, self._found = run_id, True
        return self._run_id

    def _tell_points(self, tracked: MlflowClient, run_id: str, points: list[Metric]) -> None:
        """Bring points, but for those that MLflow refuses for good, which are found by halving."""
        if len(points) == 1:
            what = f"{points[0].key} at {points[0].step:,} images"
            with self._unless_refused(tracked, run_id, what):
                tracked.log_batch(run_id, metrics=points)
            return
        try:
            tracked.log_batch(run_id, metrics=points)
        except MlflowException as error:
            if not is_refused(error):
                raise
            half = len(points) // 2
            self._tell_points(tracked, run_id, points[:half])
            self._tell_points(tracked, run_id, points[half:])

    @contextlib.contextmanager
    def _unless_refused(self, tracked: MlflowClient, run_id: str, what: str) -> Iterator[None]:
        """Leave out, with a warning, what MLflow refuses for good: the rest is not to wait."""
        try:
            yield
        except TROUBLE as error:
            if not is_refused(error):
                raise
            if find_run(tracked, run_id) is None:  # somebody deleted the run: it is made again
                self._found = False
                raise
            log.warning(
                "MLflow refuses %s of run %s (%s); it is left out, and stays in %s",
                what,
                run_id,
                first_line(error),
                self.path,
            )

    def _tell(self, tracked: MlflowClient, run_id: str, entry: Mapping[str, Any]) -> None:
        """Bring an entry, points aside."""
        if "start" in entry:
            _complete(tracked, run_id, entry["start"])
        if "tags" in entry:
            tracked.log_batch(run_id, tags=[RunTag(k, v) for k, v in entry["tags"].items()])
        if "end_children" in entry:
            _end_trials(self.uri, entry["children"], entry["end_children"])
            end_children(self.uri, run_id, entry["end_children"])
        if "file" in entry:
            self._tell_file(tracked, run_id, entry["file"])
        if entry.get("status") == "RUNNING":
            tracked.update_run(run_id, status="RUNNING")
            if _ENDED in tracked.get_run(run_id).data.tags:
                tracked.delete_tag(run_id, _ENDED)
        elif "status" in entry:
            tracked.set_terminated(run_id, entry["status"], entry["timestamp"])

    def _tell_file(self, tracked: MlflowClient, run_id: str, name: str) -> None:
        file = self.path.with_suffix("") / name
        far = self._far and storage.join(self._far, name)
        if not file.exists() and far and storage.exists(far):
            storage.write_bytes(file, storage.read_bytes(far))
        if file.exists():
            tracked.log_artifact(run_id, str(file), PurePosixPath(name).parent.as_posix())
        else:
            log.warning("%s of run %s is lost: it was on a node that is gone", name, run_id)

    @property
    def _stem(self) -> str:
        return str(self.path.with_suffix(""))

    def _lines(self, entries: list[dict[str, Any]]) -> bytes:
        kept = self._far and self._far.rpartition("/")[0]
        header = {"uri": public(self.uri), _KEY: self.key, "kept": kept}
        return "".join(json.dumps(line) + "\n" for line in (header, *entries)).encode()


def _tell_sent(run_id: str | None, sent: int) -> bytes:
    return json.dumps({"run_id": run_id, "entries": sent}).encode()


def _told_sent(note: bytes) -> tuple[str | None, int]:
    """Return the MLflow run and how many entries it has; of a note that is not whole, nothing."""
    try:
        told = json.loads(note)
        return told["run_id"], int(told["entries"])
    except (ValueError, TypeError, KeyError):
        return None, 0  # what was sent is sent again, which MLflow does not show


def deliver(where: str | Path) -> dict[str, int]:
    """Send what journals still hold; return by run id how many entries went out.

    Args:
        where: a folder of journals, a run's folder or a folder of runs, the latter two here or in
            an object store. Of a run in an object store that still goes on elsewhere, leave it to
            the run.

    Raises:
        UserError: a server does not answer; what others take is delivered nevertheless.
    """
    out, failed = {}, None
    with _journals(where) as found:
        for journal in found:
            before = journal.unsent
            if not before:
                continue
            try:
                journal.send_all()
            except TROUBLE as error:
                told = UserError(
                    f"MLflow at {public(journal.uri)} does not take the rest of run "
                    f"{journal.run_id} ({first_line(error)}): try sync again later."
                )
                told.__cause__ = error
                failed = failed or told
            else:
                out[journal.run_id] = before
    if failed is not None:
        raise failed
    return out


curve = records.curve


def waiting(where: str | Path) -> dict[str, int]:
    """Return by run id how many entries ``deliver`` would send."""
    with _journals(where) as found:
        return {journal.run_id: journal.unsent for journal in found if journal.unsent}


@contextlib.contextmanager
def _journals(where: str | Path) -> Iterator[list[Journal]]:
    """Yield all journals below a place, those of an object store in files that are gone later."""
    place = storage.absolute(where)
    names = [
        name
        for name in sorted(storage.list_files(place))
        if re.fullmatch(rf"[^/]+\.jsonl|([^/]+/)?({_EVALUATION}\d+/)?{_NAME}\.jsonl", name)
    ]
    with tempfile.TemporaryDirectory() as tmp:
        found = []
        for number, name in enumerate(names):
            if storage.is_local(place):
                found.append(Journal.stored(Path(place, name)))
            elif name.endswith(f"{_NAME}.jsonl"):
                folder = storage.join(place, name).rpartition("/")[0]
                found.append(Journal.stored(Path(tmp, str(number), f"{_NAME}.jsonl"), folder))
        # A nested run needs the one above it, which brings those below it before it ends; and an
        # evaluation needs the run, which its journal does not begin.
        there = (one for one in found if one is not None)
        yield sorted(there, key=lambda one: (not one.begun, one.nested))


def experiment_of(tracked: MlflowClient, name: str, uri: str) -> str:
    """Return the id of an experiment, made if it is not there."""
    found = tracked.get_experiment_by_name(name)
    if found is None:
        path = _sqlite_path(uri)
        # Without a server MLflow would put artifacts below whatever folder a process is in.
        where = None if path is None else (path.parent / "artifacts" / name).as_uri()
        note = DESCRIPTIONS.get(name.removeprefix("ivegan-"), "")
        try:
            tags = {
                "mlflow.note.content": note,
                "mlflow.experimentKind": "custom_model_development",  # not a language model's
            }
            return tracked.create_experiment(name, where, tags)
        except MlflowException:
            found = tracked.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    return found.experiment_id


def run_exists(tracked: MlflowClient, run_id: str) -> bool:
    """Return whether a store knows a run by its id or key, deleted ones aside."""
    return find_run(tracked, run_id) is not None


def find_run(tracked: MlflowClient, run_id: str) -> str | None:
    """Return the MLflow id of a run that is given by its id or its key; None if there is none."""
    if not is_id(run_id):
        everywhere = [one.experiment_id for one in tracked.search_experiments()]
        wanted = f"tags.{_KEY} = '{run_id}'"
        found = tracked.search_runs(everywhere, wanted, max_results=1) if everywhere else []
        return found[0].info.run_id if found else None
    try:
        alive = tracked.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run_id if alive else None


@contextlib.contextmanager
def absent_as_none() -> Iterator[None]:
    """Leave the block where MLflow has no such run."""
    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def is_id(run_id: str) -> bool:
    """Return whether this is MLflow's id of a run, not our key."""
    return re.fullmatch("[0-9a-f]{32}", run_id) is not None


def _create(
    tracked: MlflowClient, uri: str, start: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    """Return the id of a new run, which lacks what ``_complete`` adds."""
    parent = start["parent"]
    if parent and not is_id(parent):
        parent = find_run(tracked, parent)
        if parent is None:
            raise UserError(f"the run {start['parent']} has to come first")
    nested = {"mlflow.parentRunId": parent} if parent else {}
    run = tracked.create_run(
        experiment_of(tracked, start["experiment"], uri),
        run_name=start["run_name"],
        start_time=start.get("timestamp"),
        tags={**start["tags"], **nested, **tags},
    )
    return run.info.run_id


def _complete(tracked: MlflowClient, run_id: str, start: Mapping[str, Any]) -> None:
    """Add what a new run should have, or what of it is missing."""
    there = tracked.get_run(run_id).data.params
    missing = [Param(k, v) for k, v in start["params"].items() if k not in there]
    tracked.log_batch(run_id, params=missing)
    name, digest, where = start["dataset"]
    about = Dataset(name, digest[:36], "ivegan", json.dumps({"uri": where}))
    context = InputTag("mlflow.data.context", "training")
    tracked.log_inputs(run_id, datasets=[DatasetInput(about, [context])])
    tracked.log_dict(run_id, start["config"], "config.json")


def refusal(uri: str, error: Exception) -> UserError:
    """Return what to tell about an error of MLflow: ``Unavailable`` if it may be gone later."""
    if is_away(error):
        return storage.Unavailable(
            f"No MLflow store answers at {public(uri)} ({first_line(error)}): start it, or set "
            "MLFLOW_TRACKING_URI."
        )
    return UserError(f"MLflow at {public(uri)} refuses: {first_line(error)}")


def is_away(error: Exception) -> bool:
    """Return whether a server did not answer, or said that it cannot now."""
    status = _status(error)
    return status in _BUSY or (status >= 500 and status != 501)


def is_refused(error: Exception) -> bool:
    """Return whether it would be refused for ever; of other errors too many may be mended."""
    if isinstance(error, MlflowException):
        return error.error_code == "INVALID_PARAMETER_VALUE"
    return _status(error) in (403, 413)  # of a file, by the store of artifacts


def _status(error: Exception) -> int:
    """Return the HTTP status that a server answered with; 500 where none did."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code()
    for one in (error, error.__context__):  # boto3 hides the answer behind an error of its own
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):
            return answer["ResponseMetadata"]["HTTPStatusCode"]
        if answer is not None:
            return answer.status_code
    return 500


def note_of(params: Mapping[str, object]) -> dict[str, str]:
    """Return the run's description for people, from its settings."""
    told = {
        "total_images": "{:,} images",
        "batch_size": "batches of {}",
        "workers": "{} worker(s)",
        "seed": "seed {}",
    }
    parts = [text.format(params[name]) for name, text in told.items() if name in params]
    return {"mlflow.note.content": ", ".join(parts)} if parts else {}


def _sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite store, or None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def user() -> str:
    return next((v for n in ("USER", "USERNAME", "LOGNAME") if (v := os.environ.get(n))), "unknown")


def first_line(error: Exception) -> str:
    """Return what people may see of an error's text, which can hold a server's whole URI."""
    return public(str(error).partition("\n")[0])[:200]
