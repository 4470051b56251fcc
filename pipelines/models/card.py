"""The model card that a registered model carries: data, training, quality, intended use."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ivegan import storage
from ivegan.evaluation import report
from pipelines.record import evaluation_uri, sound_evaluation

_DATA = {
    "ring": "Points of a mixture of Gaussians, drawn from a formula.",
    "grid": "Points of a mixture of Gaussians, drawn from a formula.",
    "digits": "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak; UCI repository, "
    "CC BY 4.0), as included in scikit-learn.",
    "mnist": "MNIST (Y. LeCun, C. Cortes, C. Burges; CC BY-SA 3.0), or a data set in its layout.",
    "celeba": "CelebA (Z. Liu, P. Luo, X. Wang, X. Tang; MMLAB, CUHK). **Its licence allows "
    "non-commercial research only, for the data and for models made from them.** The people in "
    "the images did not consent; the model must not be used to recognise or depict a person.",
}
_USE = {
    "encoder": "Codes for search, clustering, few-label classification and comparison of images "
    "like those it was trained on. A code keeps what is invariant under the transformations below, "
    "and little else; for other images it is meaningless.",
    "generator": "Variations of an image from its code, samples and interpolations, to look at "
    "what the encoder keeps. Its images are synthetic: they are no evidence of anything.",
}


def render(
    name: str,
    half: str,
    usage: str,
    metadata: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, float]],
) -> str:
    """Return the model card of an encoder or generator in Markdown.

    Args:
        usage: inputs and outputs, in a sentence.
        metadata: of its checkpoint, with ``config``.
        evaluations: as ``evaluations_of`` returns them.
    """
    config = metadata["config"]
    lines = [f"# {name}", "", usage, "", "## Intended use", "", _USE[half], "", "## Data", ""]
    lines += [_DATA[config["dataset"]], "", f"Data set hash: `{metadata.get('dataset_hash')}`", ""]
    ways = ("border", "condition", "encoder")
    moved = {k: v for k, v in config["transform"].items() if v and k not in ways}
    lines += ["## Training", "", f"IVE-GAN, {metadata['images_seen']:,} images seen, one seed."]
    lines += [f"Transformations: {', '.join(f'{k} {v}' for k, v in moved.items())}.", ""]
    origin = ("run_id", "mlflow_run_id", "git_commit", "config_hash")
    lines += [f"- {key}: `{metadata[key]}`" for key in origin if key in metadata]
    lines += ["", "All settings: `config.json`.", "", "## Quality, on held-out data", ""]
    if not evaluations:
        return "\n".join([*lines, "Not evaluated when it was registered."]) + "\n"
    several = len(evaluations) > 1
    spread = f" mean ± sd of {len(evaluations)} seeds |" if several else ""
    lines += [f"| | this run |{spread} to compare with |"]
    lines += ["| --- | --- |" + " --- |" * several + " --- |"]
    for row in report.rows(evaluations[0]):
        column = f" {_spread(row, evaluations)} |" if several else ""
        lines.append(f"| {row.meaning.title} | {row.value} |{column} {row.compare} |")
    if not several:
        lines += ["", "One training: another seed gives other numbers, and the spread is unknown."]
    return "\n".join(lines) + "\n"


def evaluations_of(run_uri: str, images_seen: int) -> list[dict[str, float]]:
    """Return the metrics of a checkpoint, then those of runs that differ in their seed only.

    There is one evaluation for each seed, and none where the checkpoint was not evaluated.
    """
    folder, _, run_id = run_uri.rpartition("/")
    seeds: dict[int, dict[str, float]] = {}
    shared = None
    for name in (run_id, *storage.list_names(folder)):
        uri = f"{evaluation_uri(storage.join(folder, name), images_seen)}/metrics.json"
        if storage.exists(uri) and (found := sound_evaluation(uri)) is not None:
            config, data = found.metadata["config"], found.metadata.get("dataset_hash")
            settings = {**config, "seed": None, "dataset_hash": data}
            shared = shared or settings
            if settings == shared:
                seeds.setdefault(config["seed"], found.metrics)
        elif shared is None:
            break
    return list(seeds.values())


def _spread(row: report.Entry, evaluations: Sequence[Mapping[str, float]]) -> str:
    """Return mean ± sd of a number, "-" where an evaluation lacks it."""
    if not all(row.name in one for one in evaluations):
        return "-"
    values = [one[row.name] for one in evaluations]
    mean, sd = (report.shown(row.meaning, f(values)) for f in (statistics.fmean, statistics.stdev))
    return f"{mean} ± {sd}"
