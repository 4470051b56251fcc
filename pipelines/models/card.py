"""The text that travels with a registered model: what it is, of what data, how good, for what."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ivegan.evaluation import report

_DATA = {
    "ring": "Points of a mixture of Gaussians, drawn from a formula.",
    "grid": "Points of a mixture of Gaussians, drawn from a formula.",
    "digits": "Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak; UCI repository, "
    "CC BY 4.0), as scikit-learn holds it.",
    "mnist": "MNIST (Y. LeCun, C. Cortes, C. Burges; CC BY-SA 3.0), or a data set in its layout.",
    "celeba": "CelebA (Z. Liu, P. Luo, X. Wang, X. Tang; MMLAB, CUHK). **Its licence allows "
    "non-commercial research only, and so for what is made from it.** The faces are of people who "
    "were not asked; the model must not be used to recognise or to depict anybody.",
}
_USE = {
    "encoder": "Codes for search, clustering, few-label classification and comparison of images "
    "like those it was trained on. A code keeps what stays the same under the transformations "
    "below, and little else; of other images it says nothing.",
    "generator": "Variations of an image from its code, samples and interpolations, for looking at "
    "what the encoder keeps. Its images are made up: they are no evidence of anything.",
}


def render(
    name: str,
    half: str,
    usage: str,
    facts: Mapping[str, Any],
    metrics: Mapping[str, float],
    seeds: Sequence[Mapping[str, float]],
) -> str:
    """Return a model card in Markdown.

    Args:
        name: of the registered model.
        half: encoder or generator.
        usage: inputs and outputs, in a sentence.
        facts: of its checkpoint, with ``config``.
        metrics: of the evaluation of the checkpoint, under their full names; may be empty.
        seeds: the same of every evaluated run that differs in nothing but its seed, this run's own
            included.
    """
    config = facts["config"]
    lines = [f"# {name}", "", usage, "", "## Intended use", "", _USE[half], "", "## Data", ""]
    lines += [_DATA[config["dataset"]], "", f"Data set hash: `{facts.get('dataset_hash')}`", ""]
    moved = {k: v for k, v in config["transform"].items() if v and k not in ("border", "condition")}
    lines += ["## Training", "", f"IVE-GAN, {facts['images_seen']:,} images seen, one seed."]
    lines += [f"Transformations: {', '.join(f'{k} {v}' for k, v in moved.items())}.", ""]
    told = ("run_id", "mlflow_run_id", "git_commit", "config_hash")
    lines += [f"- {key}: `{facts.get(key)}`" for key in told]
    lines += ["", "All settings: `config.json`.", "", "## Quality, on held-out data", ""]
    if metrics:
        several = len(seeds) > 1
        spread = f" mean ± sd of {len(seeds)} seeds |" if several else ""
        lines += [f"| | this run |{spread} to hold it against |"]
        lines += ["| --- | --- |" + " --- |" * several + " --- |"]
        wide = _spread(seeds)
        for title, value, against, _ in report.rows(metrics):
            beside = f" {wide.get(title, '-')} |" if several else ""
            lines.append(f"| {title} | {value} |{beside} {against} |")
        if not several:
            lines += ["", "One training: another seed gives other numbers, and no spread is known."]
    else:
        lines += ["Not evaluated when it was registered."]
    return "\n".join(lines) + "\n"


def _spread(seeds: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return mean ± sd of each number that all of the runs have, by its title."""
    out = {}
    for name in set.intersection(*map(set, seeds)) if len(seeds) > 1 else ():
        values, short = [one[name] for one in seeds], name.removeprefix(report.PREFIX)
        if short in report.MEANINGS:
            mean, sd = (
                report.shown(short, f(values)) for f in (statistics.fmean, statistics.stdev)
            )
            out[report.MEANINGS[short].title] = f"{mean} ± {sd}"
    return out
