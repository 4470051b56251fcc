"""Commands that tests start: waiting and killing."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


def command(
    *words: str, cwd: Path, status: int = 0, kill_at: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program of ours to its end, ``train.py ring``, and check its exit status.

    With ``kill_at`` it and all that it starts get SIGKILL there (``killer/sitecustomize.py``).
    """
    if kill_at:
        paths = f"{ROOT}/tests/support/killer{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        variables |= {"KILL_AT": kill_at, "PYTHONPATH": paths}
        status = -signal.SIGKILL
    done = subprocess.run(
        program(*words),
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
    )
    assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def program(name: str, *words: str) -> list[str]:
    """Return the command line of a program of ours."""
    folder = "data_prep" if name in ("build.py", "verify.py") else "pipelines"
    return [sys.executable, str(ROOT / folder / name), *words]


def wait_for(ready: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    """Return once it is ready; fail with the log if the process ends or two minutes pass."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if ready():
            return
        time.sleep(0.2)  # between two looks
    pytest.fail(f"not ready:\n{log.read_text()[-2000:]}")


def interrupted(
    words: list[str],
    cwd: Path,
    after: str,
    by: signal.Signals,
    look: Callable[[psutil.Process], None] = lambda process: None,
) -> tuple[int, str]:
    """Send a command a signal once it has printed a line; return its exit status and its stderr.

    A command that does not end is killed. ``look`` is called before the signal.
    """
    started = subprocess.Popen(
        words,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and all that it starts would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert started.stdout is not None
        for line in started.stdout:
            if after in line:
                break
        look(psutil.Process(started.pid))
        started.send_signal(by)
        _, err = started.communicate(timeout=180)
    finally:
        kill(started)
    return started.returncode, err


def kill(process: subprocess.Popen) -> None:
    """Kill a process with all that it started."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                child.kill()
        process.kill()
        process.wait(60)
