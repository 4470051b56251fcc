"""A run's progress in a terminal."""

import sys
import time
from datetime import timedelta
from typing import Any

from pipelines.training.plan import Plan

Event = dict[str, Any]


class Display:
    """Shows a run's events: a progress bar in a terminal, plain lines elsewhere.

    A line stands for every checkpoint, and for every twentieth of the run or half minute between.
    """

    def __init__(self, plan: Plan) -> None:
        self.total = plan.config.total_steps * plan.config.batch_size
        self.printed = (0, time.monotonic())  # images, seconds
        self.bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.total,
                unit=" images",
                unit_scale=True,
                dynamic_ncols=True,
                file=sys.stdout,
            )

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if "line" in event:
            self._write(event["line"])
        if "metrics" in event:
            saved = event["checkpoint"].rpartition("/")[2] if "checkpoint" in event else ""
            self._progress(event["images_seen"], event["metrics"], saved)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self.bar is not None:
            self.bar.close()

    def _progress(self, seen: int, metrics: dict[str, float], saved: str) -> None:
        rate = metrics["rate/images_per_second"]
        losses = "  ".join(
            f"{label} {metrics[name]:.3f}"
            for label, name in (
                ("D", "loss/D"),
                ("D'", "loss/D_prime"),
                ("GE", "loss/GE_pair"),
                ("G'", "loss/GE_prior"),
            )
        )
        if self.bar is not None:
            self.bar.set_postfix_str(losses, refresh=False)
            self.bar.update(seen - self.bar.n)
            return
        images, seconds = self.printed
        if not saved and seen - images < self.total / 20 and time.monotonic() - seconds < 30:
            return
        self.printed = (seen, time.monotonic())
        left = timedelta(seconds=round((self.total - seen) / rate))
        print(
            f"images {seen:>{len(f'{self.total:,}')},} of {self.total:,}  "
            f"{rate:>7,.0f} images/s  {left} left  "
            f"loss {losses}" + (f"  saved {saved}" if saved else ""),
            flush=True,
        )

    def _write(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)
