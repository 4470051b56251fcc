"""Progress that the driver shows and measures during a run, read from the run's record."""

import logging
import re
from collections.abc import Callable
from typing import Any

from ivegan import checkpoint, storage
from ivegan.checkpoint import PREFIX
from ivegan.errors import UserError
from pipelines.record import METRICS, read_points, write_points
from pipelines.training.plan import Plan

log = logging.getLogger(__name__)

Event = dict[str, Any]
Show = Callable[[Event], None]
Measure = Callable[[str], dict[str, float]]


class Follower:
    """Passes on what is new in a run's folder: points, and checkpoints with their scores."""

    def __init__(self, plan: Plan, show: Show | None, measure: Measure | None) -> None:
        self._plan, self._show, self._measure = plan, show, measure
        self._folder = storage.join(plan.run_uri, METRICS)
        self._names = set(storage.list_names(self._folder))
        self._saved = set(checkpoint.checkpoints(plan.run_uri))
        self._warned = False

    def look(self) -> None:
        """Pass on what is new; trouble with the storage is left to the workers, who write to it."""
        try:
            events = self._new_events()
        except UserError as error:
            if not self._warned:
                log.warning("The progress of the run cannot be read (%s)", error)
            self._warned = True
            return
        for event in events:
            if self._measure is not None and "checkpoint" in event:
                scores = self._measure(event["checkpoint"])
                write_points(self._plan.run_uri, event["images_seen"], scores, "score")
                event["metrics"] |= scores
            if self._show is not None:
                self._show(event)

    def _new_events(self) -> list[Event]:
        # Checkpoints first: the points of a checkpoint are written before it.
        saved = {
            f"{name.removeprefix(PREFIX)}.jsonl": storage.join(self._plan.run_uri, name)
            for name in storage.list_names(self._plan.run_uri)
            if name.startswith(PREFIX)
        }
        saved = {name: uri for name, uri in saved.items() if uri not in self._saved}
        saved = {k: uri for k, uri in saved.items() if storage.exists(f"{uri}/config.json")}
        names = set(storage.list_names(self._folder)) - self._names
        flushes = {name for name in names if re.fullmatch(r"\d+\.jsonl", name)}
        events = []
        for name in sorted(flushes | saved.keys()):
            (point,) = read_points(storage.join(self._folder, name))
            event = {"images_seen": point.images_seen, "metrics": dict(point.metrics)}
            events.append(event | ({"checkpoint": saved[name]} if name in saved else {}))
        self._names |= names
        self._saved |= set(saved.values())
        return events
