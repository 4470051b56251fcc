"""The output of a sweep: a line per score, a table, a figure and the command of the best trial."""

import shlex
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback

from ivegan import checkpoint, storage
from ivegan.config import flatten
from ivegan.config import preset as preset_of
from ivegan.errors import UserError
from pipelines import options as cli
from pipelines import record as records
from pipelines.sweeps.definition import Definition
from pipelines.sweeps.space import SearchObjective
from pipelines.sweeps.trial import index_name, name_of
from pipelines.training.plan import Plan, Run, shared


class Cut(BaseException):
    """Ends Tune's loop. After an Exception Tune would wait for all trials to end."""


class ScorePrinter(Callback):
    """Prints the scores of a sweep as they come."""

    cut = threading.Event()
    """Ends the sweep. An attribute of the class, since a restored sweep unpickles its callbacks."""

    def __init__(
        self, total: int, length: int, objective: SearchObjective, stopped: Callable[[str], None]
    ) -> None:
        self.total, self.length, self.objective = total, length, objective
        self.stopped = stopped

    def on_step_begin(self, iteration: int, trials: Any, **_: Any) -> None:
        """Leave Tune's loop if the sweep is interrupted."""
        if self.cut.is_set():
            raise Cut

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
    ) -> None:
        """Print a score, and the best of the last scores of all trials."""
        metric, rank = self.objective.metric, self.objective.rank
        if metric not in result or result.get("diverged"):
            return
        last = {name_of(t): t.last_result.get(metric) for t in trials}
        last[name_of(trial)] = result[metric]
        best = min(last, key=lambda name: rank(last[name]))
        print(
            f"trial {name_of(trial)}  {result['images_seen']:>{len(f'{self.length:,}')},} images  "
            f"{self.objective.name} {result[metric]:.3f}  (best {last[best]:.3f}, trial {best})",
            flush=True,
        )

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Print the end of a trial; record a trial that was stopped early."""
        last = trial.last_result
        early = not last.get("diverged") and last.get("images_seen", 0) < self.length
        how = "diverged" if last.get("diverged") else "stops early" if early else "is done"
        self._ended(trials, trial, how)
        if early:
            self.stopped(name_of(trial))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Print the failure of a trial."""
        error = str(trial.get_pickled_error() or "unknown error")
        self._ended(trials, trial, f"failed ({error.strip().splitlines()[-1][:200]})")

    def _ended(self, trials: Any, trial: Any, how: str) -> None:
        count = len({t.trial_id for t in trials if t.is_finished()} | {trial.trial_id})
        print(f"trial {name_of(trial)} {how}; {count} of {self.total} have ended", flush=True)


def result_of(plan: Plan, definition: Definition, ends: Any) -> dict[str, Any]:
    """Return the result of a search, its trials sorted by score.

    Raises:
        UserError: no trial has a score.
    """
    objective = definition.objective
    by_name = {Path(end.path).name: end for end in ends}
    settings = {name: end.config or {} for name, end in by_name.items()}
    if definition.trials is not None:  # Tune has no result of a trial that the budget left out
        settings = {index_name(i): changes for i, changes in enumerate(definition.trials)}
    trials = [
        _trial_result(plan, objective, name, settings[name], by_name.get(name)) for name in settings
    ]
    trials.sort(key=lambda t: objective.rank(t[objective.metric]))
    best = trials[0]
    if best[objective.metric] is None:
        raise UserError(f"No trial of {plan.run_id} came as far as a score; see {plan.run_uri}.")
    return {
        "sweep_id": plan.run_id,
        "preset": plan.preset,
        "length": plan.config.total_images,
        "objective": {"metric": objective.metric, "mode": objective.mode},
        "best_config": best["config"],
        "best_metric": best[objective.metric],
        "trials": trials,
        "figure": storage.join(plan.run_uri, "figures", "sweep.png"),
        "command": command_of(plan, best["config"]),
    }


def _trial_result(
    plan: Plan, objective: SearchObjective, name: str, settings: dict[str, Any], end: Any
) -> dict[str, Any]:
    """Return the result of a trial: its numbers from its run folder, its end from Tune."""
    run_id = f"{plan.run_id}-{name}"
    run_uri = storage.join(plan.run_uri.rpartition("/")[0], run_id)
    points = records.points_with(run_uri, objective.metric)
    seen = points[-1].images_seen if points else 0
    if end is not None and (end.metrics or {}).get("diverged"):
        state = "diverged"
    elif end is not None and end.error:
        state = "failed"
    elif not points:
        state = "not scored"
    else:
        # A trial of another batch size ends at another multiple of it.
        state = "done" if seen >= plan.config.total_images else "stopped early"
    scores = points[-1].metrics if points and state != "diverged" else {objective.metric: None}
    return {
        "trial": name,
        "run_id": run_id,
        "config": settings,
        **scores,
        "images_seen": seen,
        "state": state,
        "checkpoint": checkpoint.uri_of(run_uri, seen) if points else None,
        "curve": {
            "images_seen": [point.images_seen for point in points],
            objective.metric: [point.metrics[objective.metric] for point in points],
        },
    }


def command_of(plan: Plan, best: dict[str, Any]) -> str:
    """Return the command that trains a configuration at full length, as its trial was trained."""
    default = flatten(preset_of(plan.preset))
    settings = {k: v for k, v in flatten(plan.config).items() if v != default[k]} | best
    settings.pop("total_images", None)
    usual = shared(Run())
    own = {k: v for k, v in shared(plan.run).items() if v != usual[k]}
    own["workers"] = max(1, plan.run.workers)
    own |= {"data": plan.data_uri} if plan.run.data else {}
    own |= {"storage": plan.run_uri.rpartition("/")[0]} if plan.run.storage else {}
    words = ["python", "pipelines/train.py", plan.preset]
    words += [word for k, v in settings.items() for word in (f"--{k}", str(v))]
    for name, value in own.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def table(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of the trials of a sweep's result, in their order."""
    trials, objective = result["trials"], SearchObjective(**result["objective"])
    names = list(trials[0]["config"])
    scores = {objective.name: objective.metric}
    scores |= {"confirmed": "confirmed"} if "confirmed" in trials[0] else {}
    rows = [["trial", "", *scores, "images", *names]]
    for one in trials:
        values = (one["config"].get(name, "") for name in names)
        rows.append(
            [
                *(one["trial"], one["state"]),
                *("" if one.get(k) is None else f"{one[k]:.4f}" for k in scores.values()),
                f"{one['images_seen']:,}",
                *(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values),
            ]
        )
    return cli.aligned(rows, right=range(2, len(rows[0])))
