"""How long a workflow's steps may take, and how often a failed one is tried again.

The text ``train=600,retries=2`` names minutes and a count. It travels in the environment, so that
the steps' processes, a resumed run and the pods of Argo Workflows all find it; what it leaves out
has the value below. This module imports nothing heavy: each step's process reads it first.
"""

import os
from typing import Any

from ivegan.errors import UserError

VARIABLE = "IVEGAN_LIMITS"
MINUTES: dict[str, float] = {
    "prepare": 24 * 60,
    "sweep": 7 * 24 * 60,
    "train": 7 * 24 * 60,
    "evaluate": 12 * 60,
    "register": 60,
}
"""So long that only a step that hangs meets them."""
RETRIES = 1
MOST_RETRIES = 4  # Metaflow's own bound


def parse(words: str) -> tuple[dict[str, int], int]:
    """Return (seconds of each step, retries of each step) that a text names.

    Raises:
        UserError: an unknown name, or a value that cannot be.
    """
    minutes, retries = dict(MINUTES), RETRIES
    for part in filter(None, (p.strip() for p in words.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        if name not in (*minutes, "retries"):
            known = ", ".join((*MINUTES, "retries"))
            raise UserError(f"--limits knows no {name!r}: give {known}, as in train=600.")
        try:
            number = float(value)
        except ValueError as error:
            raise UserError(f"--limits {name} takes a number, but got {value!r}.") from error
        if name == "retries":
            if number not in range(MOST_RETRIES + 1):
                raise UserError(f"--limits retries is {value}, but must be 0 to {MOST_RETRIES}.")
            retries = int(number)
        elif 1 <= number * 60 <= 366 * 24 * 3600:
            minutes[name] = number
        else:
            raise UserError(f"--limits {name} is {value} minutes, but must be 1 second to 1 year.")
    return {name: round(value * 60) for name, value in minutes.items()}, retries


def text(given: str = "") -> str:
    """Return the text that counts: the given one, or that of the environment."""
    return given or os.environ.get(VARIABLE, "")


def arguments() -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Return what Metaflow's decorators take: of timeout by step, of retry, and of environment.

    Raises:
        UserError: as for ``parse``.
    """
    seconds, retries = parse(text())
    return (
        {name: {"seconds": value} for name, value in seconds.items()},
        {"times": retries, "minutes_between_retries": 1},  # Argo waits; here it follows at once
        {"vars": {VARIABLE: text()}},
    )
