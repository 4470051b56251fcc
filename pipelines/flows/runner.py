"""Metaflow as a process: its environment, its runs and their results."""

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ivegan import storage
from ivegan.errors import UserError
from pipelines.paths import runs_dir

NAME = "IveGanFlow"
MISTAKE = "IVEGAN_MISTAKE"
"""Variable with the file in which a step leaves the sentence of a UserError for the command."""
_FLOW = Path(__file__).with_name("flow.py")
_ROOT = "METAFLOW_DATASTORE_SYSROOT"
_DECORATORS = "METAFLOW_DEFAULT_DECOSPECS"
_RETRY = "retry:times=1,minutes_between_retries=1"  # Argo waits; here a retry follows at once


def add_decorator(specification: str) -> None:
    """Add a decorator to all steps, as Metaflow's ``--with`` does: ``retry:times=3``."""
    earlier = os.environ.get(_DECORATORS, "")
    os.environ[_DECORATORS] = f"{earlier} {specification}".strip()


def prepare_environment(datastore: str | None) -> None:
    """Set the variables that Metaflow needs, where they are not set.

    Raises:
        UserError: a datastore in S3 without a URI, or a local one where nothing is kept.
    """
    if datastore:
        place = storage.absolute(datastore)
        kind = "local" if storage.is_local(place) else "s3"
        os.environ["METAFLOW_DEFAULT_DATASTORE"] = kind
        os.environ[f"{_ROOT}_{kind.upper()}"] = place
    if _in_s3() and not os.environ.get(f"{_ROOT}_S3"):
        raise UserError("METAFLOW_DEFAULT_DATASTORE is s3: give --datastore s3://BUCKET/FOLDER.")
    own = Path(tempfile.gettempdir()) / f"ivegan-{os.getuid()}"
    if f"{_ROOT}_LOCAL" not in os.environ:
        try:
            local = runs_dir()
        except UserError:
            if not _in_s3():
                raise
            local = own  # with a datastore in S3, local records are not needed later
        os.environ[f"{_ROOT}_LOCAL"] = str(local)
    # By default one folder of /tmp for all users, of which the first is the owner.
    os.environ.setdefault("METAFLOW_CLIENT_CACHE_PATH", str(own / "metaflow_client"))
    if not _in_s3():
        # Whatever its value, Metaflow (2.19) then keeps cards with its other records.
        os.environ.setdefault("METAFLOW_CARD_LOCALROOT", os.environ[f"{_ROOT}_LOCAL"])
    # Metaflow refuses root as a user's name, which is that of containers.
    users = (os.environ.get(k) for k in ("METAFLOW_USER", "SUDO_USER", "USERNAME", "USER"))
    if not any(user and user != "root" for user in users):
        os.environ["METAFLOW_USER"] = "ivegan"
    add_decorator(_RETRY)  # of two with one name, the first counts
    for name, value in storage.environment().items():
        os.environ.setdefault(name, value)


def _in_s3() -> bool:
    return os.environ.get("METAFLOW_DEFAULT_DATASTORE", "local") == "s3"


def origin_of(run_id: str | None) -> str:
    """Return the id of a Metaflow run of the datastore: this one, or the last.

    Raises:
        UserError: there is none.
    """
    root = os.environ[f"{_ROOT}_S3"] if _in_s3() else f"{os.environ[f'{_ROOT}_LOCAL']}/.metaflow"
    parts = [name.split("/") for name in storage.list_files(storage.join(root, NAME))]
    # Where a run was killed at its very start there is nothing to continue.
    runs = {run for run, *rest in parts if rest[:1] == ["_parameters"]}
    own = [run for run in runs if run.isdigit()]  # not those of Argo Workflows
    if run_id not in runs if run_id else not own:
        raise UserError(
            f"There is no workflow {run_id or 'to resume'} in {root}: start one with run, or give "
            "the --datastore of its start."
        )
    return run_id or max(own, key=int)  # ids are microseconds since 1970


def call(arguments: list[str]) -> int:
    """Run Metaflow's own command on the flow, and return its exit status."""
    return subprocess.run([sys.executable, str(_FLOW), *arguments], check=False).returncode


def run(arguments: list[str]) -> dict[str, Any]:
    """Run or resume the flow, and return its result with the id of the Metaflow run.

    Raises:
        UserError: raised by a step.
        SystemExit: with Metaflow's status, where a step failed.
    """
    with tempfile.TemporaryDirectory() as tmp:
        mistake, run_id = Path(tmp) / "mistake", Path(tmp) / "run_id"
        sys.stdout.flush()
        with subprocess.Popen(
            [sys.executable, str(_FLOW), "--quiet", *arguments, "--run-id-file", str(run_id)],
            env={**os.environ, MISTAKE: str(mistake)},
            stdout=subprocess.PIPE,  # the reader of ours may close it, which would fail Metaflow
            stderr=subprocess.STDOUT,  # the error sentence alone is on ours
            text=True,
        ) as flow:
            ended = False
            while not ended:  # Ctrl-C reaches Metaflow too, which then ends its steps
                with contextlib.suppress(KeyboardInterrupt):
                    for line in flow.stdout or ():
                        print(line, end="", flush=True)
                    ended = True
            status = flow.wait()
        if status and mistake.exists():  # of the step that failed last
            raise UserError(mistake.read_text())
        if status:
            print("The workflow stopped; continue it with `workflow.py resume`.", file=sys.stderr)
            raise SystemExit(status)
        name = run_id.read_text().strip()
    from metaflow.client.core import Run, namespace

    namespace(None)
    artifacts = Run(f"{NAME}/{name}").data
    assert artifacts is not None, "a finished run has artifacts"
    return {"metaflow_run": name, **artifacts.result}
