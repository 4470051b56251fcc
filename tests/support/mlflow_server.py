"""A real MLflow server on loopback that tests kill and start again, and what it stands on."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import free_ports, kill, wait_for

from ivegan import storage


class MlflowServer:
    """An MLflow server, always on the same port and store; to be ended by ``kill``."""

    def __init__(self, folder: Path, store: str, artifacts: str) -> None:
        """Take a folder for its log, the URI of its database and the place of its artifacts."""
        (port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{port}"
        self._folder, self._log = folder, folder / "mlflow-server.log"
        self._words = ["--port", str(port), "--workers", "1", "--backend-store-uri", store]
        self._words += ["--artifacts-destination", artifacts]
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, and return once it answers."""
        program = str(Path(sys.executable).with_name("mlflow"))
        with self._log.open("a") as out:
            self._process = subprocess.Popen(
                [program, "server", *self._words],
                stdout=out,
                stderr=out,
                cwd=self._folder,
                env=os.environ | storage.environment(),
            )
        wait_for(self._answers, self._process, self._log)

    def kill(self) -> None:
        """End it, with all its processes, by SIGKILL."""
        if self._process is not None:
            kill(self._process)
            self._process = None

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except OSError:
            return False
        return True


@contextmanager
def postgres() -> Iterator[str]:
    """Yield the URI of a fresh database in a PostgreSQL server of one test; skip without one."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/postgres"), shutil.which("postgres")]
    programs = [Path(program).resolve().parent for program in found if program]
    if not programs:
        pytest.skip("install PostgreSQL (postgres and initdb) to test MLflow on it")
    (port,) = free_ports(1)
    # It does not run as root, nor would another user reach pytest's folder.
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
        os.chown(tmp, user.pw_uid, user.pw_gid)
        data, log = Path(tmp) / "data", Path(tmp) / "log"
        run = {"cwd": tmp, "env": {"LC_ALL": "C", "PATH": os.environ["PATH"]}}
        run |= as_user if os.getuid() == 0 else {}
        words = ["-D", data, "-U", "ivegan", "-A", "trust", "--encoding=UTF8", "--no-sync"]
        made = subprocess.run(
            [programs[0] / "initdb", *words],
            capture_output=True,
            text=True,
            **run,
        )
        assert made.returncode == 0, made.stderr
        words = ["-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", tmp]
        with log.open("w") as out:
            server = subprocess.Popen(
                [programs[0] / "postgres", *words], stdout=out, stderr=out, **run
            )
        try:
            ask = [programs[0] / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
            wait_for(
                lambda: subprocess.run(ask, capture_output=True, **run).returncode == 0, server, log
            )
            yield f"postgresql://ivegan@127.0.0.1:{port}/postgres"
        finally:
            kill(server)
