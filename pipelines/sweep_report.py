"""What people see of a sweep: a line for every score, a table, a picture and an HTML page."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune import Callback

from ivegan import figures
from ivegan.report import Figure, page, picture, text

SCORE = "valid/quality"
"""What decides between trials: ``ivegan.evaluate.quality``, on the validation split."""

_CAPTION = (
    "Left, the course of every trial: dark the best, light blue the others of full length, grey "
    "what was stopped early. Right, the last score of each trial against what was searched."
)


class Progress(Callback):
    """Shows the scores of a sweep as they come: a bar in a terminal, plain lines elsewhere."""

    def __init__(self, total: int, length: int, name: Callable[[dict[str, Any], str], str]) -> None:
        self.total, self.length, self.name = total, length, name
        self.done: set[str] = set()
        self.best = ("", float("-inf"))
        self._bar: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the terminal out: Tune pickles this with the sweep."""
        return {**self.__dict__, "_bar": None}

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
    ) -> None:
        """Show a score."""
        if SCORE not in result:
            return
        name, score = self.name(trial.config, trial.trial_id), result[SCORE]
        if score > self.best[1]:
            self.best = (name, score)
        self._write(
            f"trial {name}  {result['images_seen']:>{len(f'{self.length:,}')},} images  "
            f"quality {score:.3f}  (best {self.best[1]:.3f}, trial {self.best[0]})"
        )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Show the end of a trial."""
        last = trial.last_result
        whole = last.get("images_seen", 0) >= self.length
        self._ended(trial, "is done" if whole else "stops early")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Show that a trial failed."""
        error = trial.get_pickled_error() or "no word of why"
        self._ended(trial, f"failed ({str(error).strip().splitlines()[-1][:200]})")

    def on_experiment_end(self, trials: Any, **_: Any) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.close()

    def _ended(self, trial: Any, how: str) -> None:
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


def table(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table of trials, in their order.

    Args:
        trials: as ``tune.sweep`` returns them.
    """
    names = list(trials[0]["config"])
    head = ["trial", "quality", "images", "", *names]
    rows = [
        [t["trial"], f"{t[SCORE]:.4f}", f"{t['images_seen']:,}", t["state"]]
        + [shown(t["config"][name]) for name in names]
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


def render(result: Mapping[str, Any], command: str) -> tuple[bytes, str]:
    """Return (PNG, HTML page) of a finished sweep.

    Args:
        result: as ``tune.sweep`` returns it.
        command: that trains the best configuration.
    """
    trials = result["trials"]
    names = [k for k, v in trials[0]["config"].items() if isinstance(v, (int, float))]
    states = [t["state"] for t in trials]
    note = f"{len(trials)} trials of {result['length']:,} images: " + ", ".join(
        f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states))
    )
    drawn = [t for t in trials if t["curve"][SCORE] and t["state"] != "diverged"]
    image = figures.search(
        [(t["curve"]["images_seen"], t["curve"][SCORE]) for t in drawn],
        {name: [t["config"][name] for t in drawn] for name in names},
        result["length"],
        f"{result['preset']}: sweep {result['sweep_id']}",
        note=note,
    )
    parts = sorted(k for k in trials[0] if k.startswith("valid/") and k != SCORE)
    settings = list(trials[0]["config"])
    head = ["trial", "quality", *(p.removeprefix("valid/") for p in parts), "images", "", *settings]
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{text(cell)}</td>"
            for cell in (
                t["trial"],
                *(f"{t[k]:.3f}" if k in t else "" for k in (SCORE, *parts)),
                f"{t['images_seen']:,}",
                t["state"],
                *(shown(t["config"][name]) for name in settings),
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
    lead = f"{note} · chosen by quality on the validation split, never by a loss"
    return figures.png(image), page(f"Sweep of {result['preset']}", lead, body)
