"""What a sweep searches: dotted settings with Ray Tune's domains, and the score to optimize.

On the command line a setting is one word: ``optim.lr_g=1e-4..2e-3`` is a range, log-uniform for
floats and uniform for integers; ``model.z_dim=2,3,8`` is a choice; ``model.z_dim=`` removes it.
"""

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ivegan.config import Config, flatten, override
from ivegan.errors import UserError

if TYPE_CHECKING:  # Ray takes seconds to import
    from ray.tune.search.sample import Domain

_RATES = "optim.lr_g=1e-4..2e-3 optim.lr_d=1e-4..2e-3"
SPACES = {
    "ring": f"{_RATES} model.z_dim=2,3,4 model.noise_dim=2,4",
    "grid": f"{_RATES} model.z_dim=2,3,4 model.noise_dim=2,4",
    "digits": f"{_RATES} model.z_dim=2,3,8,16,32 model.noise_dim=2,4,8",
    "mnist": f"{_RATES} model.z_dim=2,3,8,16,32 model.noise_dim=2,4,8",
    "celeba": f"{_RATES} model.z_dim=128,256,512,1024 model.noise_dim=4,16,64",
}
"""Default search space of each data set."""

_POINTS = "quality right_mode coverage high_quality"
_CLASSES = "quality same_class one_nn near frechet"
SCORES = {
    "ring": _POINTS,
    "grid": _POINTS,
    "digits": _CLASSES,
    "mnist": _CLASSES,
    "celeba": "quality same_attributes probe_auroc near frechet",
}
"""Scores that ``ivegan.evaluation.evaluate.quality`` returns; the first is the default."""
_MINIMIZED = ("frechet",)
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class SearchObjective:
    """The score that trials are compared by."""

    metric: str
    """A score on the validation split, under its MLflow name."""
    mode: Literal["max", "min"]

    @property
    def name(self) -> str:
        """The score's name in tables and figures."""
        return self.metric.removeprefix("valid/")

    @property
    def worst(self) -> float:
        """The score of a diverged trial."""
        return math.inf if self.mode == "min" else -math.inf

    def rank(self, score: float | None) -> float:
        """Return a sort key, smaller for better scores; a missing score sorts last."""
        if score is None:
            return math.inf
        return score if self.mode == "min" else -score


def objective_of(config: Config, score: str = "") -> SearchObjective:
    """Return the objective of a sweep.

    Raises:
        UserError: the data set has no such score.
    """
    scores = SCORES[config.dataset].split()
    name = score.removeprefix("valid/") or scores[0]
    if name not in scores:
        choices = ", ".join(f"valid/{one}" for one in scores)
        raise UserError(f"--score {score} is not known for {config.dataset}; choose from {choices}")
    return SearchObjective(f"valid/{name}", "min" if name in _MINIMIZED else "max")


def space_of(config: Config, changes: str = "") -> dict[str, str]:
    """Return the search space of a configuration, as text by setting.

    Args:
        config: configuration whose data set defines the default space.
        changes: settings to add, replace or remove (``NAME=``), separated by spaces.

    Raises:
        UserError: an unknown setting, or values that the setting cannot take.
    """
    space: dict[str, str] = {}
    for word in (*SPACES[config.dataset].split(), *changes.split()):
        name, equals, values = word.partition("=")
        if not equals:
            raise UserError(
                f"--space {word!r} has no values: write NAME=1,2,3 for a choice, NAME=1e-4..1e-2 "
                "for a range, NAME= to leave a setting out."
            )
        override(config, {name: flatten(config).get(name)})  # raises for an unknown setting
        space.pop(name, None)
        if values:
            ends = _values(config, name, values)
            space[name] = (".." if ".." in values else ",").join(map(str, ends))
    if not space:
        raise UserError("--space leaves nothing to search: name a setting with several values.")
    return space


def typed(config: Config, name: str, text: str) -> Any:
    """Return the value that a text gives to a setting.

    Raises:
        UserError: an unknown setting, or a value that it cannot take.
    """
    override(config, {name: flatten(config).get(name)})  # raises for an unknown setting
    kind = type(flatten(config)[name])
    try:
        value = _BOOLS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise UserError(f"{name} takes values of type {kind.__name__}, not {text!r}.") from error
    override(config, {name: value})
    return value


def _values(config: Config, name: str, text: str) -> list[Any]:
    """Return the values of a choice, or both ends of a range, checked against the configuration."""
    is_range = ".." in text
    values = [typed(config, name, part) for part in text.split(".." if is_range else ",")]
    if is_range:
        numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
        positive = ", both greater than 0" if isinstance(values[0], float) else ""
        if len(numbers) != 2 or numbers != sorted(set(numbers)) or (positive and numbers[0] <= 0):
            raise UserError(f"--space {name}={text} is no range: write LOW..HIGH{positive}.")
    return values


def domains(config: Config, space: dict[str, str]) -> dict[str, "Domain"]:
    """Return Ray Tune's domain of each setting of a space."""
    from ray import tune

    found: dict[str, Domain] = {}
    for name, text in space.items():
        values = _values(config, name, text)
        if ".." not in text:
            found[name] = tune.choice(values)
        elif isinstance(values[0], int):
            found[name] = tune.randint(values[0], values[1] + 1)  # the upper bound is exclusive
        else:
            found[name] = tune.loguniform(*values)
    return found


def draw(
    config: Config, space: dict[str, str], samples: int, seed: int, *, grid: bool
) -> list[dict[str, Any]]:
    """Return the settings of each trial, a function of the space, the seed and the trial's index.

    With ``grid``, each combination of the choices is tried ``samples`` times, and ranges are drawn
    anew for each.
    """
    choices = {k: _values(config, k, v) for k, v in space.items() if grid and ".." not in v}
    drawn = {k: v for k, v in domains(config, space).items() if k not in choices}
    trials = []
    for index, (_, *fixed) in enumerate(itertools.product(range(samples), *choices.values())):
        random = np.random.default_rng((seed, index))
        chosen = dict(zip(choices, fixed, strict=True))
        chosen |= {name: _sample(domain, random) for name, domain in drawn.items()}
        trials.append({name: chosen[name] for name in space})
    return trials


def _sample(domain: "Domain", random: np.random.Generator) -> Any:
    """Return a draw as a plain Python value, floats rounded to four digits."""
    value = domain.sample(random_state=random)
    value = value.item() if isinstance(value, np.generic) else value
    return float(f"{value:.4g}") if isinstance(value, float) else value
