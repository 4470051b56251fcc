"""A session with Ray: attach or start, resources, and what signals do to it."""

import contextlib
import logging
import os
import secrets
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, NoReturn, TypeVar

import psutil

from ivegan import storage
from ivegan.errors import UserError
from pipelines.background import repeated

T = TypeVar("T")
_LOOK, _MINUTE = 5, 60  # seconds between two looks at the nodes, and two lines about them
# A Ray of this process's own has nobody to report to, and no node to lose.
QUIET = {
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "GLOO_SOCKET_IFNAME": "lo",  # its ranks exchange gradients on loopback
}


@contextlib.contextmanager
def ray_session(dashboard: bool = False) -> Iterator[None]:
    """Attach to the cluster of RAY_ADDRESS, or start a local Ray for as long as it is needed."""
    # Where a signal ends a run, the thread that it ran in must not start Ray once more.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # read when ray is imported
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    alone = not os.environ.get("RAY_ADDRESS")
    if not alone:
        _check_ray_address()
        try:
            ray.init(runtime_env={"env_vars": storage.environment()}, **quiet)
        except ConnectionError as error:
            raise UserError(
                f"{error}: is it running, and are RAY_AUTH_MODE and RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) those of the cluster?"
            ) from error
    else:
        for name, value in {**QUIET, **storage.environment()}.items():
            os.environ.setdefault(name, value)  # its processes inherit them
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # Ray would write one into the home
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        if "RAY_TMPDIR" not in os.environ:  # TMPDIR/ray may be another user's, or its path too long
            quiet["_temp_dir"] = f"/tmp/ivegan-ray-{os.getuid()}"
        quiet["runtime_env"] = this_python()
        try:
            ray.init(address="local", include_dashboard=dashboard, **quiet)
        except Exception as error:  # Ray raises that class where its processes do not answer
            raise UserError(
                f"Ray did not start on this machine ({' '.join(str(error).split())}): start the "
                "command again when less runs here, or give --workers 0."
            ) from error
    try:
        yield
    finally:
        workers = _below_raylets() if alone else []
        ray.shutdown()
        for process in workers:  # now and then one deadlocks at its exit
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def this_python() -> dict[str, str]:
    """Return the runtime environment of workers below a folder whose name has a space."""
    # Ray 2.60 puts the path of its Python into a shell's command as it is.
    return {"py_executable": shlex.quote(sys.executable)} if " " in sys.executable else {}


def _check_ray_address() -> None:
    """Check that the host of RAY_ADDRESS answers: Ray would retry indefinitely."""
    address = os.environ["RAY_ADDRESS"].removeprefix("ray://")
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"No Ray cluster answers at RAY_ADDRESS {address} ({error}): correct or unset it."
            ) from error


def _below_raylets() -> list[psutil.Process]:
    """Return the raylets that this process started, and their workers."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if process.name().startswith("raylet"):
                found += [process, *process.children(recursive=True)]
    return found


def require_resources(
    sizes: Sequence[int], each: dict[str, float], patience: float, log_line: Callable[[str], None]
) -> int:
    """Return the largest number of workers that the cluster can hold.

    Args:
        sizes: numbers to choose from, the largest first.
        each: resources of one worker.
        patience: seconds to wait for an autoscaler to add nodes for the largest.
        log_line: called with each line about the waiting.

    Raises:
        UserError: it can hold none of them.
    """
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + patience
    workers, least = sizes[0], sizes[-1]
    asked = 0  # times
    try:
        while (room := _room(each)) < workers:
            if not os.environ.get("RAY_ADDRESS") or time.monotonic() >= deadline:
                if fitting := [size for size in sizes if size <= room]:
                    log_line(f"{fitting[0]} workers instead of {workers}: the cluster has no room.")
                    return fitting[0]
                waited = f" after waiting {patience:g} s" if asked else ""
                raise UserError(
                    f"{least} workers of {_words(each)} each were asked for, but the cluster has "
                    f"room for {room}{waited}; lower --workers or --threads, or add nodes"
                    + ("." if waited else " (--wait-for-nodes waits for an autoscaler).")
                )
            request_resources(bundles=[each] * workers)
            if asked % (_MINUTE // _LOOK) == 0:
                log_line(_missing(room, workers, each))
            asked += 1
            threading.Event().wait(_LOOK)  # the autoscaler offers nothing to wait on
        return workers
    finally:
        if asked:  # taken back, or the autoscaler would hold the nodes indefinitely
            request_resources(bundles=[])


@contextlib.contextmanager
def missing_nodes_logged(
    workers: int, each: dict[str, float], log_line: Callable[[str], None]
) -> Iterator[None]:
    """Log once a minute what the cluster lacks while the block runs: a node may be lost."""

    def look() -> None:
        if (room := _room(each)) < workers:
            log_line(_missing(room, workers, each))

    with repeated(look, _MINUTE, "nodes"):
        yield


def _missing(room: int, workers: int, each: dict[str, float]) -> str:
    return f"waiting for nodes: room for {room} of {workers} workers of {_words(each)} each"


def _words(each: dict[str, float]) -> str:
    return " and ".join(f"{v:g} {k}" for k, v in each.items())


def _room(each: dict[str, float]) -> int:
    """Return how many workers the nodes that are alive can hold, busy or not."""
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return sum(int(min(n.get(k, 0) // v for k, v in each.items())) for n in nodes)


def in_a_thread(call: Callable[[], T], cut: Callable[[], object] | None = None) -> T:
    """Make a call in another thread and return its result.

    In the main one Ray Train would take Ctrl-C over, and an exception that a signal raises inside
    Ray gets lost: a terminated run would continue.

    Args:
        call: what to call.
        cut: makes the call end soon. Where a signal ends the main thread's waiting it is called and
            waited for, because Ray aborts a process that uses it while it shuts down.
    """
    outcome = started(call)
    try:
        return answer_of(outcome)
    except (KeyboardInterrupt, Terminated):
        if cut is not None:
            cut()
            wait([outcome], timeout=60)
        raise


def started(call: Callable[..., T], *given: Any) -> Future[T]:
    """Make a call in a daemon thread and return its Future."""
    outcome: Future[T] = Future()

    def make() -> None:
        try:
            outcome.set_result(call(*given))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=make, daemon=True).start()
    return outcome


def answer_of(outcome: Future[T]) -> T:
    """Return what another thread's call returns, once it does; a signal ends the waiting."""
    # In turns, because a signal that another thread took is looked at only when this one wakes.
    while not wait([outcome], timeout=0.5).done:
        continue
    return outcome.result()


class Terminated(BaseException):
    """SIGTERM arrived: end the run in order, the last checkpoint stays."""


@contextlib.contextmanager
def terminated_by_signal(grace: float = 0.0) -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM into ``Terminated`` while training; only the main thread can do so.

    Args:
        grace: seconds after the first SIGTERM until it is raised.

    Yields:
        a function that returns whether SIGTERM has arrived.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        if asked.is_set() or not grace:
            raise Terminated
        asked.set()
        signal.setitimer(signal.ITIMER_REAL, grace)  # ends in SIGALRM

    before = {name: signal.signal(name, stop) for name in (signal.SIGTERM, signal.SIGALRM)}
    try:
        yield asked.is_set
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name, handler in before.items():
            signal.signal(name, handler)


def stopped(stop: BaseException, flags: str) -> NoReturn:
    """End a command that a signal stopped, with a shell's status for it."""
    print(f"stopped; continue with {flags}", file=sys.stderr)
    by = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    raise SystemExit(128 + by) from None
