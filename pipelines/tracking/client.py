"""The MLflow client: opened with bounded patience, its errors in sentences without credentials."""

import contextlib
import logging
import os
import re
import sqlite3
import textwrap
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote

import mlflow
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.entities import Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

from ivegan import storage
from ivegan.errors import UserError, public
from ivegan.storage.local import lock
from pipelines.paths import sqlite_path

log = logging.getLogger(__name__)

# MLflow's own errors; where artifacts go to S3 directly, boto3's errors come through.
_MLFLOW_TROUBLE = (MlflowException, OSError, Boto3Error, BotoCoreError, ClientError)
TROUBLE = (*_MLFLOW_TROUBLE, UserError)
_BUSY = (408, 409, 425, 429)  # the statuses below 500 after which a request is repeated
_KIND = ("mlflow.experimentKind", "custom_model_development")  # not a language model's
KEY = "run_key"  # the tag by which a run is found again

_LOCATIONS = (  # columns of MLflow's tables that hold places of artifacts
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)

DESCRIPTIONS = {
    "ring": "Eight Gaussians on a ring: does IVE-GAN find all of them, equally often? (Fig. 2)",
    "grid": "Twenty-five Gaussians on a grid: does IVE-GAN find all of them, equally often?",
    "digits": "Scikit-learn's 1,797 handwritten digits, 16x16: a demonstration, minutes on a CPU.",
    "mnist": "MNIST, 32x32: samples, reconstructions and the latent space. (Figs. 3 to 5)",
    "celeba": "CelebA, 128x128: samples, variations, attributes, interpolation. (Figs. 6 to 9)",
}


def client(uri: str) -> MlflowClient:
    """Return a quiet client that gives up on a dead server within a minute.

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
    for name in ("alembic", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # They log each attempt, and with a traceback what they raise as well.
    for name in ("urllib3.connectionpool", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not uri.startswith("http"):
        _adapt_databases()
    path = sqlite_path(uri)
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Of several first runs at once one makes the tables; MLflow's own attempts collide.
            # Where nothing can be written there is no first run.
            writable = os.access(path.parent, os.W_OK)
            own = (
                lock(path.with_name(f"{path.name}.lock")) if writable else contextlib.nullcontext()
            )
            with own:
                with contextlib.closing(sqlite3.connect(path)) as database:
                    tables = database.execute("SELECT name FROM sqlite_master").fetchall()
                if ("experiments",) not in tables:
                    MlflowClient(uri).search_experiments(max_results=1)
                _move_artifacts(path)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"The MLflow store {path} cannot be opened ({error}); set MLFLOW_TRACKING_URI."
            ) from error
    chosen = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    if chosen is None:  # it sets the variable as well, as if the user had chosen the store
        os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        return MlflowClient(uri)
    except (ImportError, NoSuchModuleError) as error:
        raise UserError(
            f"The MLflow store {public(uri)} needs a driver that is not installed ({error}): "
            "pip install 'ivegan[server]' has the one of PostgreSQL."
        ) from error
    except SQLAlchemyError as error:
        raise refusal(uri, error) from error


def _adapt_databases() -> None:
    """Let MLflow give up on a dead database sooner, and find its tables below a folder with a %."""
    from mlflow.store.db import utils  # takes a second, for nothing where a server is asked

    utils.MAX_RETRY_COUNT = 7  # 12 s; its 10 attempts take 102 s
    folder = str(Path(mlflow.__file__).parent)
    if "%" in folder:  # alembic would take it for an interpolation
        utils._get_package_dir = lambda: folder.replace("%", "%%")


def _move_artifacts(path: Path) -> None:
    """Let a store's artifacts be those beside it, where it was moved or copied with them."""
    here = path.parent / "artifacts"
    if not here.is_dir():
        return  # the file alone was moved
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = database.execute("SELECT name, artifact_location FROM experiments").fetchall()
        roots = {
            where.removesuffix(f"/{quote(name)}")
            for name, where in rows
            if where.startswith("file:") and where.endswith(f"/artifacts/{quote(name)}")
        }
        for root in roots - {here.as_uri()}:
            for table, column in _LOCATIONS:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE substr({column}, 1, ?) = ?",
                    (here.as_uri(), len(root) + 1, len(root) + 1, f"{root}/"),
                )


def check(uri: str, experiment: str) -> None:
    """Check that a tracking store answers, and that this account may add runs to an experiment.

    Raises:
        UserError: it does not, or may not; nothing should start before that is fixed.
    """
    try:
        tracked = client(uri)
        # A tag that the experiment has: setting it needs the permission that a new run needs.
        tracked.set_experiment_tag(experiment_of(tracked, experiment, uri), *_KIND)
    except _MLFLOW_TROUBLE as error:
        if _status(error) == 403:
            account = os.environ.get("MLFLOW_TRACKING_USERNAME", "this account")
            raise UserError(
                f"{account} may not add runs to the experiment {experiment} of {public(uri)}: get "
                "EDIT on it, or choose another with --experiment."
            ) from error
        raise refusal(uri, error) from error


def experiment_of(tracked: MlflowClient, name: str, uri: str) -> str:
    """Return the id of an experiment, which is created if it does not exist."""
    experiment = tracked.get_experiment_by_name(name)
    if experiment is None:
        path = sqlite_path(uri)
        # Without a server MLflow would put artifacts below whatever folder a process is in.
        where = None if path is None else (path.parent / "artifacts" / name).as_uri()
        note = DESCRIPTIONS.get(name.removeprefix("ivegan-"), "")
        try:
            tags = {"mlflow.note.content": note, _KIND[0]: _KIND[1]}
            return tracked.create_experiment(name, where, tags)
        except MlflowException:
            experiment = tracked.get_experiment_by_name(name)  # another process was faster
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise UserError(
            f"The experiment {name} was deleted in MLflow: `mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}` restores it, or choose another with "
            "--experiment."
        )
    return experiment.experiment_id


def runs_of(tracked: MlflowClient, key: str) -> list[Run]:
    """Return the MLflow runs of a key, or of MLflow's own id; deleted ones are included."""
    name = "attributes.run_id" if re.fullmatch("[0-9a-f]{32}", key) else f"tags.{KEY}"
    everywhere, page = [], None
    while page != "":
        found = tracked.search_experiments(ViewType.ALL, page_token=page)
        everywhere += [one.experiment_id for one in found]
        page = found.token or ""
    if not everywhere:
        return []
    return list(tracked.search_runs(everywhere, f"{name} = '{key}'", ViewType.ALL))


def find_run(tracked: MlflowClient, key: str) -> str | None:
    """Return the MLflow id of a run that is given as for ``runs_of``; None if it was deleted."""
    runs = [run for run in runs_of(tracked, key) if run.info.lifecycle_stage == "active"]
    return runs[0].info.run_id if runs else None


def log_settings(
    tracked: MlflowClient, run_id: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> Run:
    """Write tags, and parameters that a run does not have yet: MLflow lets none change.

    Returns:
        the run as it was before.
    """
    before = tracked.get_run(run_id)
    missing = [Param(k, str(v)) for k, v in params.items() if k not in before.data.params]
    tracked.log_batch(run_id, params=missing, tags=[RunTag(k, v) for k, v in tags.items()])
    return before


def log_file(tracked: MlflowClient, run_id: str, place: str, name: str, folder: str) -> None:
    """Copy a file, by its name below a place, to a folder of a run's artifacts.

    Links out of the place, and what MLflow refuses for good, are left out.
    """
    if not storage.is_inside(place, name):
        log.warning("%s leads out of %s: left out", name, place)
        return
    with TemporaryDirectory() as tmp:
        path = Path(tmp, PurePosixPath(name).name)
        path.write_bytes(storage.read_bytes(storage.join(place, name)))
        try:
            tracked.log_artifact(run_id, str(path), folder)
        except TROUBLE as error:
            if _status(error) not in (400, 403, 413):
                raise
            log.warning("MLflow refuses %s of %s (%s): left out", name, place, first_line(error))


def refusal(uri: str, error: Exception) -> UserError:
    """Return the sentence for an error of MLflow: ``Unavailable`` if it may pass."""
    if "database schema" in str(error):  # of another version of MLflow, whose remedy it names
        return UserError(f"MLflow at {public(uri)} refuses: {' '.join(str(error).split())}")
    # Of a database that lets nobody in, and of Databricks without credentials, the error has the
    # remedy.
    status = _status(error)
    away = status in _BUSY or (status >= 500 and status != 501)
    if not away or "FATAL:" in str(error) or uri.startswith(("databricks", "uc:")):
        return UserError(f"MLflow at {public(uri)} refuses: {first_line(error)}")
    cause: BaseException = error
    while cause.__context__ is not None:  # requests and SQLAlchemy wrap it several times
        cause = cause.__context__
    if sqlite_path(uri):
        return storage.Unavailable(
            f"The MLflow store {uri} cannot be used ({first_line(cause)}): check its disk, or "
            "set MLFLOW_TRACKING_URI."
        )
    return storage.Unavailable(
        f"No MLflow store answers at {public(uri)} ({first_line(cause)}): start it, or set "
        "MLFLOW_TRACKING_URI."
    )


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


def user() -> str:
    """Return the name of the user, as MLflow shows it."""
    return next((v for n in ("USER", "USERNAME", "LOGNAME") if (v := os.environ.get(n))), "unknown")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, shortened, with credentials masked."""
    line = public(str(error).partition("\n")[0]) or type(error).__name__
    return textwrap.shorten(line, 300, placeholder=" …")
