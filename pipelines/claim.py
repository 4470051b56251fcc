"""The claim on a run's folder: one process at a time writes there.

``claim-0000000001.json`` names a process. To claim a folder is to create the next numbered file,
which only one of several processes can do. The owner rewrites its file every few seconds; if it
does not change for a while by the clock of a process that waits, its owner is dead and the next
number is free. An owner that finds a higher number than its own has lost the folder, and stops.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil

from ivegan import storage
from ivegan.errors import UserError
from ivegan.storage.schema import DamagedError, read
from pipelines.background import repeated
from pipelines.record import is_dead

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that a resumed run waits for the folder."""
_RENEWAL, _LEASE, _LOOK = 10.0, 40.0, 1.0  # seconds
_PREFIX = "claim-"


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """The content of a file."""

    owner: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    host: str = dataclasses.field(default_factory=socket.gethostname)
    pid: int = dataclasses.field(default_factory=os.getpid)
    pid_started: float = dataclasses.field(default_factory=lambda: psutil.Process().create_time())
    renewals: int = 0
    released: bool = False

    def encode(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @property
    def is_free(self) -> bool:
        """Whether its owner has released it, or has died on this machine."""
        return self.released or is_dead(self.host, self.pid, self.pid_started)


@contextlib.contextmanager
def claimed(
    run_uri: str, patience: float, log_line: Callable[[str], None]
) -> Iterator[threading.Event]:
    """Own a run's folder while the block runs; SIGTERM ends this process if it loses the folder.

    The event is set when another process has taken the folder over. An outage of the object store
    is waited for.

    Args:
        run_uri: the folder.
        patience: seconds to wait for another owner to end.
        log_line: called with a line if there is one to wait for.

    Raises:
        UserError: another process owns the folder.
    """
    number, mine = _take(run_uri, patience, log_line)
    lost, where, renewals = threading.Event(), _where(run_uri, number), itertools.count(1)

    def renew() -> None:
        if lost.is_set():
            return
        try:
            if max(_numbers(run_uri), default=number) > number:
                lost.set()
                log.error("another process has taken %s over: stopping", run_uri)
                os.kill(os.getpid(), signal.SIGTERM)
                return
            renewed = dataclasses.replace(mine, renewals=next(renewals))
            storage.write_bytes(where, renewed.encode())
        except UserError as error:  # an outage: tried again
            log.warning("the claim on %s cannot be renewed (%s)", run_uri, error)

    try:
        with storage.longer_retries(), repeated(renew, _RENEWAL, "claim"):
            yield lost
    finally:
        if not lost.is_set():
            with contextlib.suppress(UserError):  # then it ends by itself
                storage.write_bytes(where, dataclasses.replace(mine, released=True).encode())


def _take(run_uri: str, patience: float, log_line: Callable[[str], None]) -> tuple[int, _Claim]:
    """Return the number of a new claim, and the claim."""
    start = changed = time.monotonic()
    mine, seen, waiting = _Claim(), b"", False
    while True:
        number = max(_numbers(run_uri), default=0)
        content = storage.read_bytes(_where(run_uri, number)) if number else b""
        now = time.monotonic()
        if content != seen:
            seen, changed = content, now
        owner = _parse(content, run_uri)
        if owner is None or owner.is_free or now - changed > _LEASE:
            taken = _where(run_uri, number + 1)
            if storage.create_bytes(taken, mine.encode()) == mine.encode():
                return number + 1, mine
            continue
        if now - start > patience:
            raise UserError(
                f"{run_uri} is in use by process {owner.pid} on {owner.host}: wait for its end, or "
                "choose another id."
            )
        if not waiting:
            log_line(f"waiting for process {owner.pid} on {owner.host}, which uses {run_uri}")
            waiting = True
        threading.Event().wait(_LOOK)  # a storage offers nothing to wait on


def _parse(content: bytes, run_uri: str) -> _Claim | None:
    """Return a claim; one that is damaged binds until it has not changed for a while."""
    if not content:
        return None
    try:
        return read(content, _Claim, run_uri)
    except DamagedError:
        return _Claim(host="an unknown host", pid=0)


def _where(run_uri: str, number: int) -> str:
    return storage.join(run_uri, f"{_PREFIX}{number:010d}.json")


def _numbers(run_uri: str) -> list[int]:
    names = [n for n in storage.list_names(run_uri) if n.startswith(_PREFIX)]
    digits = [n.removeprefix(_PREFIX).removesuffix(".json") for n in names]
    return [int(d) for d in digits if d.isdecimal()]
