"""MLflow runs: started and ended by a driver, fed from a thread that training never waits for.

Every point is written to a journal first and sent afterwards, always with the same step, value and
time, so that a point sent twice is one point (MLflow keeps one of several equal ones). What an
outage held back stays in the journal, and ``deliver`` brings it later.
"""

import contextlib
import json
import logging
import math
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from ivegan import storage
from ivegan.errors import UserError

log = logging.getLogger(__name__)

_BATCH = 100  # points of the journal in one request
_LONGEST_PAUSE = 30.0  # seconds between two attempts
_LAST_CHANCE = 20.0  # seconds that the end of a run waits for the server

DESCRIPTIONS = {
    "ring": "Eight Gaussians on a ring: does IVE-GAN find all of them, equally often? (Fig. 2)",
    "grid": "Twenty-five Gaussians on a grid: does IVE-GAN find all of them, equally often?",
    "digits": "Scikit-learn's 1,797 handwritten digits, 16x16: a demonstration, minutes on a CPU.",
    "mnist": "MNIST, 32x32: samples, reconstructions and the latent space. (Figs. 3 to 5)",
    "celeba": "CelebA, 128x128: samples, variations, attributes, interpolation. (Figs. 6 to 9)",
}


def default_uri(runs: Path) -> str:
    """Return the URI of the local store, one SQLite file below a folder of runs."""
    return f"sqlite:///{runs.absolute() / 'mlflow.db'}"


def client(uri: str) -> MlflowClient:
    """Return a client that says little and gives up on a dead server within a minute.

    Raises:
        UserError: the store cannot be opened.
    """
    for name, value in {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
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
) -> str:
    """Return the id of a new MLflow run, or of the given one, which then runs again.

    Args:
        uri: of the tracking store.
        experiment: made, with a description, if it is not there.
        run_name: as people see it.
        params: dotted names and values.
        tags: of the run.
        config: kept as ``config.json``.
        dataset: name, digest and where it lies, for MLflow's dataset input.
        parent_run_id: run to nest this one under.
        run_id: of an earlier start of the same run.

    Raises:
        UserError: no tracking store answers, and there is no run id to go on with.
    """
    try:
        tracked = client(uri)
        if run_id is not None and run_exists(tracked, run_id):
            tracked.update_run(run_id, status="RUNNING")
            return run_id
        nested = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        source = {"mlflow.source.type": "JOB", "mlflow.source.name": Path(sys.argv[0]).name}
        run = tracked.create_run(
            _experiment(tracked, experiment, uri),
            run_name=run_name,
            tags={**_note(params), **tags, **nested, **source, "mlflow.user": _user()},
        )
        new = run.info.run_id
        tracked.log_batch(new, params=[Param(k, str(v)) for k, v in params.items()])
        name, digest, source = dataset
        about = Dataset(name, digest[:36], "ivegan", json.dumps({"uri": source}))
        context = InputTag("mlflow.data.context", "training")
        tracked.log_inputs(new, datasets=[DatasetInput(about, [context])])
        tracked.log_dict(new, dict(config), "config.json")
    except (MlflowException, OSError) as error:
        if run_id is not None:  # the journal takes what the store does not
            log.warning("MLflow does not answer (%s); run %s goes on", _first(error), run_id)
            return run_id
        raise UserError(
            f"No MLflow store answers at {public(uri)} ({_first(error)}): start it, or set "
            "MLFLOW_TRACKING_URI."
        ) from error
    return new


def end_run(uri: str, run_id: str, status: str, journal: Path | None = None) -> None:
    """End a run as FINISHED, FAILED or KILLED; an outage is logged, never raised.

    Args:
        uri: of the tracking store.
        run_id: of the run.
        status: one of the three.
        journal: takes the status where the store does not, for ``deliver`` to bring.
    """
    try:
        client(uri).set_terminated(run_id, status)
    except (MlflowException, OSError, UserError) as error:
        log.warning("MLflow was not told that run %s is %s: %s", run_id, status, _first(error))
        if journal is not None:
            with contextlib.suppress(OSError):  # a full disk: what was said above must do
                Journal.open(journal, uri, run_id).add({"status": status})


def add_report(
    uri: str, run_id: str, metrics: Mapping[str, float], images_seen: int, folder: Path
) -> bool:
    """Put an evaluation's numbers and files under a run; return whether the store has that run.

    An outage is logged, never raised: the report is on disk.
    """
    try:
        tracked = client(uri)
        if not run_exists(tracked, run_id):
            return False
        now = time.time_ns() // 1_000_000
        found = [Metric(k, v, now, images_seen) for k, v in metrics.items() if math.isfinite(v)]
        tracked.log_batch(run_id, metrics=found)
        tracked.log_artifacts(run_id, str(folder), "evaluation")
    except (MlflowException, OSError, UserError) as error:
        log.warning("MLflow did not take the evaluation of run %s: %s", run_id, _first(error))
        return False
    return True


def end_children(uri: str, parent_run_id: str, note: str) -> int:
    """End the nested runs whose processes were stopped from outside; return how many there were.

    Args:
        uri: of the tracking store.
        parent_run_id: of the run that they are nested under.
        note: becomes their tag ``ended``.
    """
    tracked = client(uri)
    experiment = tracked.get_run(parent_run_id).info.experiment_id
    nested = f"tags.`mlflow.parentRunId` = '{parent_run_id}'"
    left = [
        run.info.run_id
        for run in tracked.search_runs([experiment], nested, max_results=5000)
        if run.info.status == "RUNNING"
    ]
    for run_id in left:
        tracked.log_batch(run_id, tags=[RunTag("ended", note)])
        tracked.set_terminated(run_id, "KILLED")
    return len(left)


@contextlib.contextmanager
def system_metrics(uri: str, run_id: str) -> Iterator[None]:
    """Log this machine's load to the run while the block runs, if that can be had."""
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor: SystemMetricsMonitor | None = None
    try:
        started = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
        started.start()
        monitor = started
    except Exception as error:  # whatever is wrong with it, training is worth more
        log.warning("No system metrics: %s", _first(error))
    try:
        yield
    finally:
        if monitor is not None:
            monitor.finish()


class Tracker:
    """Feeds one run with metrics and figures, in the background.

    Nothing here waits for MLflow or raises for its sake. Neither does a full disk stop anybody.
    """

    def __init__(self, uri: str, run_id: str, journal: Path) -> None:
        self._journal = Journal.open(journal, uri, run_id)
        self._wake = threading.Condition()
        self._closing = False
        self._told = False
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Note metrics at a number of images seen; what was noted before stays as it was."""
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        self._note(lambda: self._journal.add_metrics(finite, images_seen))

    def figure(self, name: str, png: bytes, images_seen: int) -> None:
        """Note a figure; MLflow shows those of one name in their order."""
        self._note(lambda: self._journal.add_figure(f"{name}-{images_seen:010d}.png", png))

    def close(self) -> None:
        """Wait a little for what is not sent yet, and say what stays behind."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(_LAST_CHANCE + 60)
        if left := self._journal.unsent:
            log.warning(
                "MLflow did not take %d entries; `python pipelines/registry.py sync` brings them.",
                left,
            )

    def _note(self, write: Callable[[], None]) -> None:
        with self._wake:
            try:
                write()
            except OSError as error:
                if not self._told:
                    log.warning("The journal cannot be written (%s); training goes on", error)
                self._told = True
            self._wake.notify()

    def _send(self) -> None:
        pause, last_chance = 0.0, math.inf
        while True:
            with self._wake:
                if pause:
                    self._wake.wait_for(lambda: self._closing, timeout=pause)
                else:
                    self._wake.wait_for(lambda: self._closing or self._journal.unsent)
                if self._closing and last_chance == math.inf:
                    last_chance = time.monotonic() + _LAST_CHANCE
                if self._closing and not self._journal.unsent:
                    return
            try:
                self._journal.send()
                pause = 0.0
            except Exception as error:  # of any kind: this thread must live on
                if not pause:
                    log.warning("MLflow does not answer (%s); training goes on", _first(error))
                pause = min(_LONGEST_PAUSE, 2 * pause or 1.0)
                if time.monotonic() >= last_chance:
                    return
                if self._closing:
                    threading.Event().wait(min(pause, 2.0))


class Journal:
    """A file of all that a run had to say, and how much of it has been delivered.

    One JSON object a line: a header with the run, then points, figures and the run's end. Beside
    it ``.sent`` counts the delivered lines; it may lag behind, since entries can be sent twice.
    """

    def __init__(self, path: Path, uri: str, run_id: str, entries: list[dict[str, Any]]) -> None:
        self.path, self.uri, self.run_id = path, uri, run_id
        self._entries = entries
        self._points = {(k, e["step"]) for e in entries for k in e.get("metrics", {})}
        self._figures = {e["figure"] for e in entries if "figure" in e}

    @classmethod
    def open(cls, path: Path, uri: str, run_id: str) -> "Journal":
        """Return a run's journal for writing; another run's of the same name is put aside."""
        header, entries = _read(path)
        if header is not None and header["run_id"] != run_id:
            aside = path.with_name(f"{path.stem}.{header['run_id']}.jsonl")
            for suffix in (".jsonl", ".sent", ""):
                if path.with_suffix(suffix).exists():
                    path.with_suffix(suffix).replace(aside.with_suffix(suffix))
            entries = []
        # Written anew, since the last line of a process that was killed may be cut.
        lines = [{"uri": public(uri), "run_id": run_id}, *entries]
        storage.write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        return cls(path, uri, run_id, entries)

    @classmethod
    def stored(cls, path: Path) -> "Journal | None":
        """Return a journal as it lies there, to deliver it; its run may still be writing."""
        header, entries = _read(path)
        if header is None:
            return None
        here = os.environ.get("MLFLOW_TRACKING_URI", "")  # with the password that no file holds
        uri = here if public(here) == header["uri"] else header["uri"]
        return cls(path, uri, header["run_id"], entries)

    @property
    def unsent(self) -> int:
        """How many entries are not delivered."""
        return len(self._entries) - self._sent

    @property
    def _sent(self) -> int:
        file = self.path.with_suffix(".sent")
        text = file.read_text().strip() if file.exists() else ""
        return min(int(text), len(self._entries)) if text.isdecimal() else 0

    def add_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write metrics down but for those of a step that is there: a resumed run repeats some."""
        fresh = {k: v for k, v in metrics.items() if (k, step) not in self._points}
        if fresh:
            self.add({"metrics": fresh, "step": step})
            self._points |= {(k, step) for k in fresh}

    def add_figure(self, name: str, png: bytes) -> None:
        """Keep a figure's file beside the journal and write it down, unless it is there."""
        if name not in self._figures:
            storage.write_bytes(self.path.with_suffix("") / name, png)
            self.add({"figure": name})
            self._figures.add(name)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write an entry down, with the time that it will have whenever it is sent."""
        stamped = {**entry, "timestamp": time.time_ns() // 1_000_000}
        with self.path.open("a") as file:
            file.write(json.dumps(stamped) + "\n")
        self._entries.append(stamped)

    def send(self) -> None:
        """Deliver the next entries, at most a batch of them.

        Raises:
            MlflowException, OSError: the server does not answer; nothing is lost.
        """
        sent = self._sent
        part = self._entries[sent : sent + _BATCH]
        metrics = [
            Metric(key, value, entry["timestamp"], entry["step"])
            for entry in part
            for key, value in entry.get("metrics", {}).items()
        ]
        tracked = client(self.uri)
        for start in range(0, len(metrics), 1000):  # MLflow's limit of one request
            tracked.log_batch(self.run_id, metrics=metrics[start : start + 1000])
        for entry in part:
            if "figure" in entry:
                file = self.path.with_suffix("") / entry["figure"]
                tracked.log_artifact(self.run_id, str(file), "figures")
            if "status" in entry:
                tracked.set_terminated(self.run_id, entry["status"], entry["timestamp"])
        self.path.with_suffix(".sent").write_text(str(sent + len(part)))


def _read(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return (header, entries) of a journal as far as its lines are whole; (None, []) of none."""
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return (found[0], found[1:]) if found else (None, [])


def deliver(folder: Path) -> dict[str, int]:
    """Send what journals in a folder still hold; return by run id how many entries went out.

    Raises:
        UserError: a server does not answer.
    """
    out = {}
    for journal in _journals(folder):
        before = journal.unsent
        try:
            while journal.unsent:
                journal.send()
        except (MlflowException, OSError) as error:
            raise UserError(
                f"MLflow at {public(journal.uri)} does not take the rest of run {journal.run_id} "
                f"({_first(error)}): try sync again later."
            ) from error
        if before:
            out[journal.run_id] = before
    return out


def waiting(folder: Path) -> dict[str, int]:
    """Return by run id how many entries ``deliver`` would send."""
    return {j.run_id: j.unsent for j in _journals(folder) if j.unsent}


def _journals(folder: Path) -> list[Journal]:
    found = [Journal.stored(path) for path in sorted(folder.glob("*.jsonl"))]
    return [journal for journal in found if journal is not None]


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Add tags to a run."""
    client(uri).log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])


def _experiment(tracked: MlflowClient, name: str, uri: str) -> str:
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
    """Return whether a store knows a run, deleted ones aside."""
    try:
        return tracked.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def public(uri: str) -> str:
    """Return a URI without the user and password that it may carry."""
    scheme, slashes, rest = uri.partition("://")
    return scheme + slashes + rest.rpartition("@")[2]


def _note(params: Mapping[str, object]) -> dict[str, str]:
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


def _user() -> str:
    return next((v for n in ("USER", "USERNAME", "LOGNAME") if (v := os.environ.get(n))), "unknown")


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
