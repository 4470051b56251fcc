"""Where local files go: one git-ignored folder, or the places that variables and flags name."""

import contextlib
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from ivegan import storage
from ivegan.errors import UserError, public

# MLflow opens on its pages for language models by default.
_UI = "http://127.0.0.1:5000/#/experiments?workflowType=machine_learning"


def runs_dir() -> Path:
    """Return the git-ignored folder of local defaults, ``runs`` below the present folder.

    Raises:
        UserError: the present folder is a throw-away copy that a Ray job was uploaded in.
    """
    here = Path.cwd()
    if "working_dir_files" in here.parts or "_ray_pkg_" in str(here):
        raise UserError(
            "This job runs in a throw-away copy of its working directory: set --storage (and "
            "--data) and MLFLOW_TRACKING_URI to places outside it."
        )
    return here / "runs"


def cache_dir() -> Path:
    """Return this node's folder for decoded images and trained classifiers."""
    if os.environ.get("IVEGAN_CACHE"):
        return Path(os.environ["IVEGAN_CACHE"])
    with contextlib.suppress(UserError):  # in a throw-away copy nothing may be kept
        return runs_dir() / "cache"
    return Path(tempfile.gettempdir()) / f"ivegan-cache-{os.getuid()}"


def runs_uri(where: str | None) -> str:
    """Return the absolute place of run folders: the one of ``--storage``, or the local default."""
    return storage.absolute(where or runs_dir() / "checkpoints")


def tracking_uri(noted: str = "") -> str:
    """Return the URI of the MLflow store: MLFLOW_TRACKING_URI, or one SQLite file in runs/.

    Args:
        noted: a store as files name it, to be returned with the password that they leave out.
    """
    own = os.environ.get("MLFLOW_TRACKING_URI", "")
    if noted and public(own) != noted:
        return noted
    return own or f"sqlite:///{runs_dir() / 'mlflow.db'}"


def mlflow_place() -> str:
    """Return where runs and models are shown: a server's address, or what starts one."""
    uri = public(os.environ.get("MLFLOW_TRACKING_URI", ""))
    return uri if uri.startswith("http") else f"make ui, then {_UI}"


def new_id(what: str) -> str:
    """Return a name that no other run or sweep has."""
    return f"{what}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"
