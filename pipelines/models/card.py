"""The model card that a registered model carries: data, training, quality, intended use."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ivegan import storage
from ivegan.evaluation import report
from pipelines.record import Evaluation, sound_evaluation

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
    """Return a model card in Markdown.

    Args:
        name: of the registered model.
        half: encoder or generator.
        usage: inputs and outputs, in a sentence.
        metadata: of its checkpoint, with ``config``.
        evaluations: metrics of the checkpoint under their full names, then those of runs that
            differ in their seed only; may be empty.
    """
    config = metadata["config"]
    lines = [f"# {name}", "", usage, "", "## Intended use", "", _USE[half], "", "## Data", ""]
    lines += [_DATA[config["dataset"]], "", f"Data set hash: `{metadata.get('dataset_hash')}`", ""]
    moved = {k: v for k, v in config["transform"].items() if v and k not in ("border", "condition")}
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
    spreads = _spread(evaluations)
    for title, value, references, _ in report.rows(evaluations[0]):
        column = f" {spreads.get(title, '-')} |" if several else ""
        lines.append(f"| {title} | {value} |{column} {references} |")
    if not several:
        lines += ["", "One training: another seed gives other numbers, and the spread is unknown."]
    return "\n".join(lines) + "\n"


def evaluations_of(run_uri: str, images_seen: int) -> list[dict[str, float]]:
    """Return the metrics of a checkpoint, then those of runs that differ in their seed only.

    Returns:
        one evaluation for each seed; nothing where the checkpoint was not evaluated.
    """
    own = _evaluation(run_uri, images_seen)
    if own is None:
        return []
    seeds = {_config(own)["seed"]: own.metrics}
    folder, _, run_id = run_uri.rpartition("/")
    for name in storage.list_names(folder):
        other = None if name == run_id else _evaluation(storage.join(folder, name), images_seen)
        if other is not None and _settings(other) == _settings(own):
            seeds.setdefault(_config(other)["seed"], other.metrics)
    return list(seeds.values())


def _evaluation(run_uri: str, images_seen: int) -> Evaluation | None:
    """Return the evaluation of a run's checkpoint, or None."""
    uri = storage.join(run_uri, f"evaluation-{images_seen:010d}", "metrics.json")
    return sound_evaluation(uri) if storage.exists(uri) else None


def _settings(evaluation: Evaluation) -> dict[str, Any]:
    """Return the settings that two evaluations must share to be seeds of one experiment."""
    data = {"dataset_hash": evaluation.metadata.get("dataset_hash")}
    return {**_config(evaluation), "seed": None, **data}


def _config(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.metadata["config"]


def _spread(evaluations: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return mean ± sd of each number that all evaluations have, by its title."""
    out = {}
    for name in set.intersection(*map(set, evaluations)) if len(evaluations) > 1 else ():
        values, short = [one[name] for one in evaluations], name.removeprefix(report.PREFIX)
        if short in report.MEANINGS:
            mean, sd = (
                report.shown(short, f(values)) for f in (statistics.fmean, statistics.stdev)
            )
            out[report.MEANINGS[short].title] = f"{mean} ± {sd}"
    return out
