"""Where local files go: one git-ignored folder, or the places that variables and flags name."""

import contextlib
import os
import shlex
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote

from ivegan import storage
from ivegan.errors import UserError, public

# MLflow opens on its pages for language models by default.
_UI = "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"


def runs_dir() -> Path:
    """Return the git-ignored folder of local defaults, ``runs`` in the working directory.

    Raises:
        UserError: nothing is kept there: it is the copy that a Ray job was uploaded in, or in a pod
            of Argo Workflows.
    """
    here = Path.cwd()
    if "working_dir_files" in here.parts or "METAFLOW_KUBERNETES_WORKLOAD" in os.environ:
        raise UserError(
            "This job's files are lost when it ends: set MLFLOW_TRACKING_URI, --storage and, where "
            "the command has them, --data, --out and --datastore to places outside its folder."
        )
    return here / "runs"


def cache_dir(default: str | None = None) -> Path:
    """Return this node's folder for decoded images and trained classifiers.

    Args:
        default: the driver's folder, for nodes whose environment names none.
    """
    if own := os.environ.get("IVEGAN_CACHE") or default:
        return Path(own)
    with contextlib.suppress(UserError):  # in a throw-away copy nothing may be kept
        return runs_dir() / "cache"
    return Path(tempfile.gettempdir()) / f"ivegan-cache-{os.getuid()}"


def runs_uri(where: str | None) -> str:
    """Return the absolute place of run folders: the one of ``--storage``, or the local default."""
    return storage.absolute(where or runs_dir() / "checkpoints")


def tracking_uri(noted: str = "") -> str:
    """Return the URI of the MLflow store: MLFLOW_TRACKING_URI, or one SQLite file in runs/.

    Args:
        noted: the store that a file names, which precedes the one in runs/. A SQLite file may have
            been moved or copied with the project, so it is not looked for.
    """
    if own := os.environ.get("MLFLOW_TRACKING_URI", ""):
        return own
    if noted and sqlite_path(noted) is None:
        return noted
    path = str(runs_dir() / "mlflow.db")
    quoted = path.replace("%", "%25").replace("?", "%3F")
    # With the plain scheme MLflow makes the folders of the path as it is quoted.
    return f"sqlite{'' if quoted == path else '+pysqlite'}:///{quoted}"


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite store, whose address may have options; None for other stores.

    Raises:
        UserError: a store in memory.
    """
    scheme, found, rest = uri.partition("://")
    if not found or scheme.partition("+")[0] != "sqlite":
        return None
    path = unquote(rest.partition("?")[0]).removeprefix("/")
    if path in ("", ":memory:"):
        raise UserError(
            f"The MLflow store {uri} is in memory, so each process would have its own: set "
            "MLFLOW_TRACKING_URI to a file, sqlite:////path/to/mlflow.db."
        )
    return Path(path).absolute()


def mlflow_place() -> str:
    """Return where runs and models are shown: a server's address, or what starts one."""
    uri = public(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if uri.startswith("http"):
        return uri
    command = f"mlflow ui --backend-store-uri {shlex.quote(uri)}" if uri else "make ui"
    return f"{command}, then {_UI}"


def new_id(what: str) -> str:
    """Return a name that no other run or sweep has."""
    return f"{what}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def present(uri: str) -> str:
    """Return where a stored place is now: below the present runs folder if the project was moved.

    A copy of a project uses its own files, not those of the original.
    """
    if uri and storage.is_local(uri):
        with contextlib.suppress(UserError):
            for number, part in enumerate(parts := Path(uri).parts):
                here = runs_dir().joinpath(*parts[number + 1 :])
                if part == "runs" and here.exists():
                    return str(here)
    return uri
