"""Servers and commands that tests start: free ports, waiting and killing."""

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest


def free_ports(count: int) -> list[int]:
    """Return free ports of loopback."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


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
