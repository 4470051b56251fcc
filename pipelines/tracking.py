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
import threading
import time
from collections.abc import Iterator, Mapping
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
    "digits": "Scikit-learn's 1,797 handwritten digits, 16x16: the demonstration, minutes on a CPU.",
    "mnist": "MNIST, 32x32: samples, reconstructions and the latent space. (Figs. 3 to 5)",
    "celeba": "CelebA, 128x128: samples, variations, attributes and interpolation. (Figs. 6 to 9)",
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
        UserError: no tracking store answers.
    """
    try:
        tracked = client(uri)
        if run_id is not None and _exists(tracked, run_id):
            tracked.update_run(run_id, status="RUNNING")
            return run_id
        nested = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        run = tracked.create_run(
            _experiment(tracked, experiment, uri),
            run_name=run_name,
            tags={**tags, **nested, "mlflow.source.type": "JOB", "mlflow.user": _user()},
        )
        new = run.info.run_id
        tracked.log_batch(new, params=[Param(k, str(v)) for k, v in params.items()])
        name, digest, source = dataset
        about = Dataset(name, digest[:36], "ivegan", json.dumps({"uri": source}))
        context = InputTag("mlflow.data.context", "training")
        tracked.log_inputs(new, datasets=[DatasetInput(about, [context])])
        tracked.log_dict(new, dict(config), "config.json")
    except (MlflowException, OSError) as error:
        told = str(error).partition("\n")[0]
        raise UserError(f"No MLflow store answers at {uri} ({told}).") from error
    return new


def end_run(uri: str, run_id: str, status: str) -> None:
    """End a run as FINISHED, FAILED or KILLED; an outage is logged, never raised."""
    try:
        client(uri).set_terminated(run_id, status)
    except (MlflowException, OSError) as error:
        log.warning("MLflow was not told that run %s is %s: %s", run_id, status, error)


@contextlib.contextmanager
def system_metrics(uri: str, run_id: str) -> Iterator[None]:
    """Log this machine's load to the run while the block runs."""
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


class Tracker:
    """Feeds one run with metrics and figures, in the background."""

    def __init__(self, uri: str, run_id: str, journal: Path) -> None:
        self._journal = Journal(journal, uri, run_id)
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, metrics: Mapping[str, float], images_seen: int) -> None:
        """Note metrics at a number of images seen; what was noted before stays as it was."""
        finite = {k: float(v) for k, v in metrics.items() if math.isfinite(v)}
        with self._wake:
            self._journal.add({"metrics": finite, "step": images_seen})
            self._wake.notify()

    def figure(self, name: str, png: bytes, images_seen: int) -> None:
        """Note a figure; MLflow shows those of one name in their order."""
        with self._wake:
            self._journal.add_figure(f"{name}-{images_seen:010d}.png", png)
            self._wake.notify()

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

    def _send(self) -> None:
        pause, last_chance = 0.0, math.inf
        while True:
            with self._wake:
                if not self._closing:
                    self._wake.wait_for(
                        lambda: self._closing or (self._journal.unsent and not pause),
                        timeout=pause or None,
                    )
                if self._closing and last_chance == math.inf:
                    last_chance = time.monotonic() + _LAST_CHANCE
                if self._closing and not self._journal.unsent:
                    return
            try:
                self._journal.send()
                pause = 0.0
            except (MlflowException, OSError) as error:
                if not pause:
                    log.warning("MLflow does not answer (%s); training goes on", _first(error))
                pause = min(_LONGEST_PAUSE, 2 * pause or 1.0)
                if time.monotonic() >= last_chance:
                    return
                if self._closing:
                    threading.Event().wait(min(pause, 2.0))


class Journal:
    """A file of all that a run had to say, and how much of it has been delivered.

    One JSON object a line: a header with the run, then points and figures. Beside it ``.sent``
    counts the delivered lines.
    """

    def __init__(self, path: Path, uri: str = "", run_id: str = "") -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        header = {"uri": uri, "run_id": run_id}
        if not whole or (run_id and whole[0] != header):
            whole = [header]  # another run's, or none
            self._sent_path.unlink(missing_ok=True)
        self.uri, self.run_id = whole[0]["uri"], whole[0]["run_id"]
        self._entries: list[dict[str, Any]] = whole[1:]
        self._steps = {e["step"] for e in self._entries if "step" in e}
        # Written anew: the last line of a process that was killed may be cut.
        path.write_text("".join(json.dumps(e) + "\n" for e in whole))
        done = self._sent_path
        self._sent = int(done.read_text() or 0) if done.exists() else 0

    @property
    def unsent(self) -> int:
        """How many entries are not delivered."""
        return len(self._entries) - self._sent

    @property
    def _sent_path(self) -> Path:
        return self.path.with_suffix(".sent")

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry down, unless one of the same step is there: a resumed run repeats some."""
        if "step" in entry:
            if entry["step"] in self._steps:
                return
            self._steps.add(entry["step"])
        entry = {**entry, "timestamp": time.time_ns() // 1_000_000}
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self._entries.append(entry)

    def add_figure(self, name: str, png: bytes) -> None:
        """Keep a figure's file beside the journal and write it down."""
        folder = self.path.with_suffix("")
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(png)
        self.add({"figure": name})

    def send(self) -> None:
        """Deliver the next entries, at most a batch of them.

        Raises:
            MlflowException, OSError: the server does not answer; nothing is lost.
        """
        part = self._entries[self._sent : self._sent + _BATCH]
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
        self._sent += len(part)
        self._sent_path.write_text(str(self._sent))


def deliver(folder: Path) -> dict[str, int]:
    """Send what journals in a folder still hold; return by run id how many entries went out.

    Raises:
        UserError: a server does not answer.
    """
    out = {}
    for path in sorted(folder.glob("*.jsonl")):
        journal = Journal(path)
        before = journal.unsent
        try:
            while journal.unsent:
                journal.send()
        except (MlflowException, OSError) as error:
            raise UserError(
                f"MLflow at {journal.uri} does not answer ({_first(error)}); try sync again later."
            ) from error
        if before:
            out[journal.run_id] = before
    return out


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
            return tracked.create_experiment(name, where, {"mlflow.note.content": note})
        except MlflowException:
            found = tracked.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    return found.experiment_id


def _exists(tracked: MlflowClient, run_id: str) -> bool:
    try:
        return tracked.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite store, or None for any other store."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _user() -> str:
    return next((v for n in ("USER", "USERNAME", "LOGNAME") if (v := os.environ.get(n))), "unknown")


def _first(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
