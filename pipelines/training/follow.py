"""Progress that the driver shows and measures during a run, read from the run's record."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

from ivegan import checkpoint, storage
from ivegan.checkpoint import PREFIX
from ivegan.errors import UserError
from pipelines.background import repeated
from pipelines.record import METRICS, read_points, write_points
from pipelines.training.plan import Plan

log = logging.getLogger(__name__)

Event = dict[str, Any]
Show = Callable[[Event], None]
Measure = Callable[[str], dict[str, float]]
_INTERVAL = 1.0  # seconds between two looks at a run's folder


class Follower:
    """Passes on what is new in a run's folder: points, and checkpoints with their scores."""

    def __init__(self, plan: Plan, show: Show | None, measure: Measure | None) -> None:
        self._plan, self._show, self._measure = plan, show, measure
        self._folder = storage.join(plan.run_uri, METRICS)
        self._names = set(storage.list_names(self._folder))
        self._saved = {uri.rpartition("/")[2] for uri in checkpoint.checkpoints(plan.run_uri)}
        self._warned = False

    def look(self) -> None:
        """Pass on what is new; trouble with the storage is left to the workers, who write to it."""
        try:
            # Checkpoints first: the points of a checkpoint are written before it.
            names = storage.list_names(self._plan.run_uri)
            saved = [n for n in names if n.startswith(PREFIX) and n not in self._saved]
            saved = [n for n in saved if self._has(n, "config.json")]
            new = [n for n in storage.list_names(self._folder) if n not in self._names]
            flushes = [n for n in new if re.fullmatch(r"\d+\.jsonl", n)]
            events = {name: self._event(name) for name in flushes}
            for folder in saved:
                name = f"{folder.removeprefix(PREFIX)}.jsonl"
                uri = storage.join(self._plan.run_uri, folder)
                events.setdefault(name, self._event(name))["checkpoint"] = uri
        except UserError as error:
            if not self._warned:
                log.warning("The progress of the run cannot be read (%s)", error)
            self._warned = True
            return
        self._names.update(new)
        self._saved.update(saved)
        for name in sorted(events):
            self._handle(events[name])

    def _has(self, *parts: str) -> bool:
        return storage.exists(storage.join(self._plan.run_uri, *parts))

    def _event(self, name: str) -> Event:
        (point,) = read_points(storage.join(self._folder, name))
        return {"images_seen": point.images_seen, "metrics": dict(point.metrics)}

    def _handle(self, event: Event) -> None:
        if self._measure is not None and "checkpoint" in event:
            scores = self._measure(event["checkpoint"])
            write_points(self._plan.run_uri, event["images_seen"], scores, "score")
            event["metrics"] |= scores
        if self._show is not None:
            self._show(event)


@contextlib.contextmanager
def following(follower: Follower) -> Iterator[None]:
    """Look at a run's folder about once a second while the block runs, and once at its end.

    Raises:
        Exception: what showing or measuring raised, after the block ended.
    """
    failures: list[Exception] = []

    def look() -> None:
        try:
            if not failures:
                follower.look()
        except Exception as error:  # of any kind: raised when the workers ended
            failures.append(error)

    with repeated(look, _INTERVAL, "progress", last=True):
        yield
    if failures:
        raise failures[0]
