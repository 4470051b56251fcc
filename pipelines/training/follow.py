"""Progress that the driver shows and measures during a run, read from the run's record."""

import logging
import re
from collections.abc import Callable
from typing import Any

from ivegan import storage
from ivegan.checkpoint import CONFIG, PREFIX, uri_of
from ivegan.errors import UserError
from pipelines.record import METRICS, read_point, write_points
from pipelines.training.plan import Plan

log = logging.getLogger(__name__)

_FLUSH = re.compile(rf"{METRICS}/(\d+)\.jsonl")
_SAVED = re.compile(rf"{PREFIX}(\d+)/{re.escape(CONFIG)}")
Event = dict[str, Any]
Show = Callable[[Event], None]
Measure = Callable[[str], dict[str, float]]


class Follower:
    """Passes on what is new in a run's folder: points, and checkpoints with their scores."""

    def __init__(self, plan: Plan, show: Show | None, measure: Measure | None) -> None:
        self._plan, self._show, self._measure = plan, show, measure
        self._seen = set(storage.list_files(plan.run_uri))
        self._warned = False

    def look(self) -> None:
        """Pass on what is new; errors of the storage are logged once, the workers raise them."""
        try:
            events = self._new_events()
        except UserError as error:
            if not self._warned:
                log.warning("The progress of the run cannot be read (%s)", error)
            self._warned = True
            return
        for event in events:
            self.pass_on(event)

    def pass_on(self, event: Event) -> None:
        """Measure a checkpoint, and show the event."""
        if self._measure is not None and "checkpoint" in event:
            scores = self._measure(event["checkpoint"])
            write_points(self._plan.run_uri, event["images_seen"], scores, "score")
            event["metrics"] |= scores
        if self._show is not None:
            self._show(event)

    def _new_events(self) -> list[Event]:
        run_uri = self._plan.run_uri
        new = set(storage.list_files(run_uri)) - self._seen
        numbers = {m[1] for name in new if (m := _FLUSH.fullmatch(name) or _SAVED.fullmatch(name))}
        events = []
        for number in sorted(numbers):
            # Of a checkpoint they are written first, though a listing may lack them.
            point = read_point(storage.join(run_uri, METRICS, f"{number}.jsonl"))
            event = {"images_seen": point.images_seen, "metrics": dict(point.metrics)}
            if f"{PREFIX}{number}/{CONFIG}" in new:
                event["checkpoint"] = uri_of(run_uri, point.images_seen)
            events.append(event)
        self._seen |= new
        return events
