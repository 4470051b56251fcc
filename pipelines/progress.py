"""A run's progress on stdout."""

import sys
import time
from datetime import timedelta
from typing import Any

from pipelines.record import RATE
from pipelines.training.plan import Plan

LOSSES = {"D": "loss/D", "D'": "loss/D_prime", "pair": "loss/GE_pair", "prior": "loss/GE_prior"}


class Display:
    """Prints a run's events: one line that is written over in a terminal, plain lines elsewhere.

    A line stays for every checkpoint; elsewhere also for every twentieth of the run or half minute.
    """

    def __init__(self, plan: Plan) -> None:
        self.total = plan.images
        self.printed = (0, time.monotonic())  # images, seconds
        self.terminal = sys.stdout.isatty()
        self.end = "\n"

    def __call__(self, event: dict[str, Any]) -> None:
        """Print one event."""
        if "line" in event:
            self._print(event["line"])
        if "metrics" in event:
            saved = event["checkpoint"].rpartition("/")[2] if "checkpoint" in event else ""
            self._progress(event["images_seen"], event["metrics"], saved)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self.end != "\n":
            print()

    def _progress(self, seen: int, metrics: dict[str, float], saved: str) -> None:
        images, seconds = self.printed
        due = seen - images >= self.total / 20 or time.monotonic() - seconds >= 30
        if not (saved or due or self.terminal):
            return
        self.printed = (seen, time.monotonic())
        rate = metrics[RATE]
        left = timedelta(seconds=round((self.total - seen) / rate))
        losses = "  ".join(f"{label} {metrics[name]:.3f}" for label, name in LOSSES.items())
        line = (
            f"images {seen:>{len(f'{self.total:,}')},} of {self.total:,}  "
            f"{rate:>7,.0f} images/s  {left} left  loss {losses}"
        )
        self._print(f"{line}  saved {saved}" if saved else line, stays=bool(saved))

    def _print(self, line: str, *, stays: bool = True) -> None:
        erase = "\r\x1b[K" if self.terminal else ""
        self.end = "" if self.terminal and not stays else "\n"
        print(erase + line, end=self.end, flush=True)
