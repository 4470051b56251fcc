"""What a pair of models must show before it goes to production.

The candidate and the pair in production are measured alike, by ``ivegan.evaluate.quality`` on the
validation split of the same data, from the weights as they lie in the registry. A candidate passes
if it is traceable, good enough for its data set, and not worse than what it replaces.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ivegan.config import Config
from ivegan.data.manifest import read_manifest
from ivegan.errors import UserError
from ivegan.evaluation.evaluate import quality

# The least of quality and of some of its parts (``ivegan.evaluate.quality``), all in [0, 1]. What
# untrained pairs have is under each: quality .33 on digits, since even random codes have neighbours
# of their own class, and .37 on the ring; the demo's pair has .65.
_POINTS = {"quality": 0.5, "right_mode": 0.5, "coverage": 0.5}
_CLASSES = {"quality": 0.4, "same_class": 0.3, "one_nn": 0.5}
LEAST: dict[str, dict[str, float]] = {
    "ring": _POINTS,
    "grid": _POINTS,
    "digits": _CLASSES,
    "mnist": _CLASSES,
    "celeba": {"quality": 0.4, "same_attributes": 0.55, "probe_auroc": 0.6},
}
MARGIN = 0.01
"""How much worse than the pair in production counts as equal: two seeds differ by more."""

_TRACEABLE = ("run_id", "dataset_hash", "config_hash", "git_commit")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A registered pair, from its own files."""

    config: Config
    encoder: nn.Module
    generator: nn.Module
    facts: Mapping[str, Any]
    """Of its checkpoint, as both halves carry them."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate measured, and why it stays shut."""

    scores: Mapping[str, float]
    """Quality and its parts, of the candidate."""
    holder_scores: Mapping[str, float] | None
    """Of the pair in production, where there is one."""
    faults: tuple[str, ...]
    """In words with their numbers; empty for a pass."""


def examine(
    candidate: Contender, holder: Contender | None, *, data: str | None, cache_dir: Path
) -> Verdict:
    """Return the verdict on a candidate.

    Args:
        candidate: who wants to go to production.
        holder: who is there.
        data: shards to judge both on; those that the candidate was trained on by default.
        cache_dir: for decoded images and the classifier.

    Raises:
        UserError: there are no data to judge on.
    """
    dataset = candidate.config.dataset
    where = None if candidate.config.is_points else data or candidate.facts.get("data")
    if where is None and not candidate.config.is_points:
        raise UserError("The candidate does not say where its data are: give --data.")
    faults = [f"it does not say its {name}" for name in _TRACEABLE if not candidate.facts.get(name)]
    trained_on = candidate.facts.get("dataset_hash")
    if where is not None and trained_on and read_manifest(where).hash != trained_on:
        faults.append(f"{where} is not the data set that it was trained on")

    def scores_of(one: Contender) -> dict[str, float]:
        return quality(one.config, one.encoder, one.generator, where, cache_dir)

    scores = scores_of(candidate)
    holder_scores = None if holder is None else scores_of(holder)
    faults += [
        f"its {name} {scores[name]:.3f} is under {least}, the least for {dataset}"
        for name, least in LEAST[dataset].items()
        if not scores[name] >= least
    ]
    if holder_scores is not None and not scores["quality"] >= holder_scores["quality"] - MARGIN:
        faults.append(
            f"its quality {scores['quality']:.3f} is under {holder_scores['quality']:.3f}, of the "
            "pair it replaces"
        )
    return Verdict(scores=scores, holder_scores=holder_scores, faults=tuple(faults))
