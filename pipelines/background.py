"""A call that is repeated in a thread beside a block of code."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeated(
    call: Callable[[], object],
    seconds: float,
    name: str,
    *,
    last: bool = False,
    patience: float | None = None,
) -> Iterator[None]:
    """Call a function every so many seconds, in a thread, while the block runs.

    Args:
        call: what is called; the thread ends if it raises.
        seconds: between two calls.
        name: of the thread.
        last: call it once more at the end of the block, and raise there what a call raised.
        patience: seconds to wait for the end of the last call; without limit by default.
    """
    done = threading.Event()
    failures: list[Exception] = []

    def run() -> None:
        try:
            while not done.wait(seconds):
                call()
            if last:
                call()
        except Exception as error:  # of any kind
            if not last:
                raise
            failures.append(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(patience)
    if failures:
        raise failures[0]
