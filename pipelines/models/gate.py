"""The gate to production: what a pair of models must show before it goes there.

Candidate and incumbent are measured alike, by ``ivegan.evaluation.evaluate.quality`` on the
validation split of the same data, from the weights in the registry. A candidate passes if its
origin is recorded, it is good enough for its data set, and it is not worse than the incumbent.
"""

from pathlib import Path

from ivegan.data.manifest import read_manifest
from ivegan.errors import UserError
from ivegan.evaluation.evaluate import quality
from pipelines.models.package import Halves
from pipelines.paths import present

# Least quality and least of some of its parts, all in [0, 1]. Untrained pairs are below each: their
# quality is 0.33 on digits, where even random codes have neighbours of their class, 0.37 on ring.
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
"""How much worse than the incumbent counts as equal: two seeds differ by more."""

_ORIGIN = ("run_id", "dataset_hash", "config_hash", "git_commit")


def examine(
    candidate: Halves, incumbent: Halves | None, data: str | None, cache_dir: Path
) -> tuple[dict[str, float], dict[str, float] | None, list[str]]:
    """Return the scores of a candidate, of the incumbent, and why the candidate does not pass.

    Raises:
        UserError: there are no data to measure on.
    """
    config, metadata = candidate[0].config, candidate[0].metadata
    shards_uri = None if config.is_points else data or present(metadata.get("data") or "") or None
    if shards_uri is None and not config.is_points:
        raise UserError("The candidate does not record where its data are: give --data.")
    absent = (None, "", "unknown")
    faults = [f"its {name} is not recorded" for name in _ORIGIN if metadata.get(name) in absent]
    trained_on = metadata.get("dataset_hash")
    if shards_uri and trained_on and read_manifest(shards_uri).hash != trained_on:
        faults.append(f"{shards_uri} is not the data set that it was trained on")

    def measure(pair: Halves) -> dict[str, float]:
        encoder, generator = pair
        networks, left_out = (encoder.network, generator.network), metadata.get("skip_bad", False)
        return quality(encoder.config, *networks, shards_uri, cache_dir, skip_bad=left_out)

    scores = measure(candidate)
    former = None if incumbent is None else measure(incumbent)
    faults += [
        f"its {name} {scores[name]:.3f} is under {least}, the least for {config.dataset}"
        for name, least in LEAST[config.dataset].items()
        if not scores[name] >= least
    ]
    if former is not None and not scores["quality"] >= former["quality"] - MARGIN:
        faults.append(
            f"its quality {scores['quality']:.3f} is under {former['quality']:.3f}, of the pair it "
            "replaces"
        )
    return scores, former, faults
