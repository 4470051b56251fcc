"""What a sweep searches: dotted settings with the values that they may take, and what it is for.

Spaces are written the same way here, on the command line and in MLflow, one setting a word:
``optim.lr_g=1e-4..2e-3`` is a range, ``model.z_dim=2,3,8`` a choice. A range of a float is drawn
evenly on a logarithmic scale, a range of whole numbers evenly.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ivegan.config import Config, flatten, override
from ivegan.errors import UserError

_RATES = "optim.lr_g=1e-4..2e-3 optim.lr_d=1e-4..2e-3"
SPACES = {
    "ring": f"{_RATES} model.z_dim=2,3,4 model.noise_dim=2,4",
    "grid": f"{_RATES} model.z_dim=2,3,4 model.noise_dim=2,4",
    "digits": f"{_RATES} model.z_dim=2,3,8,16,32 model.noise_dim=2,4,8",
    "mnist": f"{_RATES} model.z_dim=2,3,8,16,32 model.noise_dim=2,4,8",
    "celeba": f"{_RATES} model.z_dim=128,256,512,1024 model.noise_dim=4,16,64",
}
"""What a sweep of a data set searches unless told otherwise."""

_POINTS = "quality right_mode coverage high_quality"
_CLASSES = "quality same_class one_nn near frechet"
SCORES = {
    "ring": _POINTS,
    "grid": _POINTS,
    "digits": _CLASSES,
    "mnist": _CLASSES,
    "celeba": "quality same_attributes probe_auroc near frechet",
}
"""What ``ivegan.evaluate.quality`` returns for a data set; the first decides between trials unless
told otherwise."""
_SMALLER_IS_BETTER = ("frechet",)


@dataclass(frozen=True)
class Objective:
    """What decides between trials."""

    metric: str
    """A score on the validation split, under the name that it has in MLflow."""
    mode: Literal["max", "min"]

    @property
    def name(self) -> str:
        """The score as people see it."""
        return self.metric.removeprefix("valid/")

    @property
    def worst(self) -> float:
        """What a trial scores that diverged."""
        return math.inf if self.mode == "min" else -math.inf

    def rank(self, score: float | None) -> float:
        """Return a number that is the smaller the better the score; none is worst of all."""
        if score is None:
            return math.inf
        return score if self.mode == "min" else -score


def objective_of(config: Config, score: str = "") -> Objective:
    """Return what decides between the trials of a sweep of this configuration.

    Args:
        config: whose data set has the scores.
        score: one of them, ``valid/near``; the data set's first by default.

    Raises:
        UserError: there is no such score.
    """
    known = SCORES[config.dataset].split()
    name = score.removeprefix("valid/") or known[0]
    if name not in known:
        told = ", ".join(f"valid/{one}" for one in known)
        raise UserError(f"--score {score} is not known for {config.dataset}; choose from {told}.")
    return Objective(f"valid/{name}", "min" if name in _SMALLER_IS_BETTER else "max")


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included."""

    low: float
    high: float
    whole: bool

    def draw(self, random: np.random.Generator) -> float | int:
        """Return one of them: whole numbers evenly, others evenly on a logarithmic scale."""
        if self.whole:
            return int(random.integers(int(self.low), int(self.high), endpoint=True))
        return float(f"{math.exp(random.uniform(math.log(self.low), math.log(self.high))):.4g}")


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def draw(self, random: np.random.Generator) -> Any:
        """Return one of them, each equally likely."""
        return self.values[int(random.integers(len(self.values)))]


Space = dict[str, Range | Choice]


def space_of(config: Config, changes: str = "") -> Space:
    """Return what a sweep of this configuration searches.

    Args:
        config: whose data set decides what is searched by default, and that holds the rest.
        changes: settings to add or to replace, written as in ``SPACES``; ``NAME=`` leaves one out.

    Raises:
        UserError: a word that is no setting, or values that the setting cannot take.
    """
    out: Space = {}
    for word in (*SPACES[config.dataset].split(), *changes.split()):
        name, equals, values = word.partition("=")
        if not equals:
            raise UserError(
                f"--space {word!r} has no values: write NAME=1,2,3 for a choice, NAME=1e-4..1e-2 "
                "for a range, NAME= to leave a setting out."
            )
        known = flatten(config)
        override(config, {name: known.get(name)})  # says so where there is no such setting
        out.pop(name, None)
        if values:
            out[name] = _domain(config, name, values, known[name])
    if not out:
        raise UserError("--space leaves nothing to search: name a setting with several values.")
    return out


def _domain(config: Config, name: str, text: str, present: Any) -> Range | Choice:
    kind = type(present)
    try:
        if ".." in text and kind in (int, float):
            low, high = (kind(end) for end in text.split(".."))
            found: Range | Choice = Range(low, high, whole=kind is int)
            ends: tuple[Any, ...] = (low, high)
            if not low < high or (kind is float and low <= 0):
                raise UserError(
                    f"--space {name}={text} is no range: write LOW..HIGH"
                    + (", both greater than 0." if kind is float else ".")
                )
        else:
            ends = tuple(
                part in ("True", "true", "1") if kind is bool else kind(part)
                for part in text.split(",")
            )
            found = Choice(ends)
    except ValueError as error:
        raise UserError(f"--space {name} takes {kind.__name__} values, not {text!r}.") from error
    for end in ends:
        override(config, {name: end})
    return found


def spelled(space: Mapping[str, Range | Choice]) -> dict[str, str]:
    """Return a space as it is written, by setting."""
    return {
        name: f"{domain.low:g}..{domain.high:g}"
        if isinstance(domain, Range)
        else ",".join(map(str, domain.values))
        for name, domain in space.items()
    }


def draw(space: Space, samples: int, seed: int, *, grid: bool) -> list[dict[str, Any]]:
    """Return the settings of every trial, each a function of the space, the seed and its place.

    Args:
        space: what is searched.
        samples: trials, or times that the grid is gone through.
        seed: of the draws.
        grid: try every combination of the choices, with the ranges drawn anew each time.
    """
    choices = {k: d.values for k, d in space.items() if isinstance(d, Choice)} if grid else {}
    rounds = itertools.product(range(samples), *choices.values())
    out = []
    for place, (_, *fixed) in enumerate(rounds):
        random = np.random.default_rng((seed, place))
        chosen = dict(zip(choices, fixed, strict=True))
        out.append({k: chosen[k] if k in chosen else d.draw(random) for k, d in space.items()})
    return out
