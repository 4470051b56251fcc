"""What people see of a sweep: a line for every score, a table, a picture and an HTML page."""

import logging
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.tune import Callback

from ivegan.evaluation import figures
from ivegan.evaluation.report import Figure, page, picture, text
from pipelines.sweeps.space import Objective

log = logging.getLogger(__name__)

_CAPTION = (
    "Left, the course of every trial: dark the best, light blue the others of full length, grey "
    "what was stopped early. Right, the last score of each trial against what was searched."
)


class Cut(BaseException):
    """Ends Tune's loop. After an Exception Tune would wait for its trials, which may go on."""


class Progress(Callback):
    """Shows the scores of a sweep as they come: a bar in a terminal, plain lines elsewhere.

    What is to be done about a trial that stops early is done in a thread: Tune waits for nothing.
    """

    cut = threading.Event()
    """Ends the sweep where it is. Of the class: a restored sweep has unpickled callbacks."""

    def __init__(
        self,
        total: int,
        length: int,
        objective: Objective,
        name: Callable[[dict[str, Any], str], str],
        stopped: Callable[[str], None],
    ) -> None:
        """Show nothing yet.

        Args:
            total: trials.
            length: images of a trial that is not stopped.
            objective: what decides between trials.
            name: returns a trial's name, from its settings and Tune's name for it.
            stopped: called with the name of every trial that stops early; may fail.
        """
        self.total, self.length, self.objective = total, length, objective
        self.name, self.stopped = name, stopped
        self.done: set[str] = set()
        self.best: tuple[str, float | None] = ("", None)
        self._bar: Any = None
        self._thread: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what lives in this process: Tune pickles this with the sweep."""
        return {**self.__dict__, "_bar": None, "_thread": None}

    def on_step_begin(self, iteration: int, trials: Any, **_: Any) -> None:
        """Leave Tune's loop if the sweep is cut."""
        if self.cut.is_set():
            raise Cut

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
    ) -> None:
        """Show a score."""
        metric = self.objective.metric
        if metric not in result or result.get("diverged"):
            return
        self._catch_up(trials)
        self._compare(trial, result)
        name, score = self.name(trial.config, trial.trial_id), result[metric]
        self._write(
            f"trial {name}  {result['images_seen']:>{len(f'{self.length:,}')},} images  "
            f"{self.objective.name} {score:.3f}  (best {self.best[1]:.3f}, trial {self.best[0]})"
        )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Show the end of a trial."""
        last = trial.last_result
        if last.get("diverged"):
            self._ended(trials, trial, "diverged")
        elif last.get("images_seen", 0) >= self.length:
            self._ended(trials, trial, "is done")
        else:
            self._ended(trials, trial, "stops early")
            self._thread = self._thread or ThreadPoolExecutor(1)
            self._thread.submit(self._tell_stopped, self.name(trial.config, trial.trial_id))

    def _tell_stopped(self, name: str) -> None:
        try:
            self.stopped(name)
        except Exception as error:  # of any kind: the end of the sweep does it again
            log.warning("Trial %s is still shown as running (%s); the sweep goes on", name, error)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Show that a trial failed."""
        error = trial.get_pickled_error() or "no word of why"
        self._ended(trials, trial, f"failed ({str(error).strip().splitlines()[-1][:200]})")

    def on_experiment_end(self, trials: Any, **_: Any) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _catch_up(self, trials: Any) -> None:
        """Take in the trials that ended before a kill: Tune does not tell of them again."""
        for trial in trials:
            if trial.is_finished() and trial.trial_id not in self.done:
                self.done.add(trial.trial_id)
                self._compare(trial, trial.last_result)

    def _compare(self, trial: Any, result: Mapping[str, Any]) -> None:
        """Keep the best score so far."""
        score = None if result.get("diverged") else result.get(self.objective.metric)
        if self.objective.rank(score) < self.objective.rank(self.best[1]):
            self.best = (self.name(trial.config, trial.trial_id), score)

    def _ended(self, trials: Any, trial: Any, how: str) -> None:
        self._catch_up(trials)
        self.done.add(trial.trial_id)
        name = self.name(trial.config, trial.trial_id)
        self._write(f"trial {name} {how}; {len(self.done)} of {self.total} have ended")
        if self._bar is not None:
            self._bar.update(len(self.done) - self._bar.n)

    def _write(self, line: str) -> None:
        if self._bar is None and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, initial=len(self.done), unit=" trials", file=sys.stdout
            )
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)


def shown(value: object) -> str:
    """Return a setting as it is shown to people, and may be pasted."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of the trials, in their order.

    Args:
        result: as ``tune.sweep`` returns it.
    """
    trials, objective = result["trials"], Objective(**result["objective"])
    names = list(trials[0]["config"])
    head = ["trial", objective.name, "images", "", *names]
    rows = [
        [t["trial"], _score(t[objective.metric], 4), f"{t['images_seen']:,}", t["state"]]
        + [shown(t["config"].get(name, "")) for name in names]
        for t in trials
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(w) if i in (0, 3) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def _score(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def render(result: Mapping[str, Any], command: str) -> tuple[bytes, str]:
    """Return (PNG, HTML page) of a finished sweep.

    Args:
        result: as ``tune.sweep`` returns it.
        command: that trains the best configuration.
    """
    trials, objective = result["trials"], Objective(**result["objective"])
    metric = objective.metric
    names = [k for k, v in trials[0]["config"].items() if isinstance(v, (int, float))]
    states = [t["state"] for t in trials]
    note = f"{len(trials)} trials of {result['length']:,} images: " + ", ".join(
        f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))
    )
    drawn = [t for t in trials if t[metric] is not None]
    image = figures.search(
        [(t["curve"]["images_seen"], t["curve"][metric]) for t in drawn],
        {name: [t["config"][name] for t in drawn] for name in names},
        result["length"],
        f"{result['preset']}: sweep {result['sweep_id']}",
        score=objective.name,
        note=note,
    )
    parts = sorted(k for k in trials[0] if k.startswith("valid/") and k != metric)
    settings = list(trials[0]["config"])
    scores = [p.removeprefix("valid/") for p in (metric, *parts)]
    head = ["trial", *scores, "images", "", *settings]
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{text(cell)}</td>"
            for cell in (
                t["trial"],
                *(_score(t.get(k), 3) for k in (metric, *parts)),
                f"{t['images_seen']:,}",
                t["state"],
                *(shown(t["config"].get(name, "")) for name in settings),
            )
        )
        + "</tr>"
        for t in trials
    )
    body = (
        f"{picture(Figure('sweep', image, _CAPTION))}<h2>The best</h2>"
        f"<p><code>{text(command)}</code></p><h2>Every trial</h2><table><thead><tr>"
        + "".join(f"<th>{text(cell)}</th>" for cell in head)
        + f"</tr></thead><tbody>{rows}</tbody></table>"
    )
    lead = f"{note} · chosen by {objective.name} on the validation split, never by a loss"
    return figures.png(image), page(f"Sweep of {result['preset']}", lead, body)
