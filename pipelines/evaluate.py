"""Measure a checkpoint or a registered model: numbers, the paper's figures, one HTML page.

    python pipelines/evaluate.py runs/checkpoints/RUN_ID --out runs/reports/RUN_ID
    python pipelines/evaluate.py models:/ivegan-digits-encoder@production --out /tmp/report

Digits take half a minute on two cores the first time, when the classifier that judges the images is
trained, and less after that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ivegan import checkpoint, storage
from ivegan.errors import UserError
from ivegan.evaluation.evaluate import evaluate
from ivegan.evaluation.report import rows
from pipelines import options as cli


@dataclass(frozen=True, kw_only=True)
class Evaluate(cli.Options):
    """Measure a checkpoint or a registered model, and draw the paper's figures."""

    checkpoint: str
    """A checkpoint's folder, a run's folder (its newest is taken) or a models:/ URI."""
    out: str | None = None
    """Folder for metrics.json, the figures and report.html."""
    data: str | None = None
    """Shards to judge on; those that the checkpoint was trained on by default."""
    device: str = "cpu"
    """Where the networks run: cpu or cuda."""
    seed: int = 0
    """Seed of every draw of the evaluation."""
    limit: int | None = None
    """Held-out samples at most; all by default."""


def evaluate_checkpoint(
    uri: str,
    *,
    data: str | None = None,
    out: str | Path,
    device: str = "cpu",
    seed: int = 0,
    limit: int | None = None,
) -> dict[str, float]:
    """Return the numbers of a checkpoint, ``eval/same_class`` and so on, after writing all files.

    Numbers and files also go under the MLflow run that made the checkpoint, where it is at hand.

    Args:
        uri: a checkpoint, a run's folder, or a registered model of either half.
        data: shards; those that the checkpoint was trained on by default.
        out: folder for ``metrics.json``, the figures and ``report.html``.
        device, seed, limit: as for ``ivegan.evaluate.evaluate``.

    Raises:
        UserError: as for ``ivegan.evaluate.evaluate``.
    """
    from pipelines.paths import cache_dir, journal_dir

    at = _resolve(uri)
    found = evaluate(
        at,
        data,
        out,
        cache_dir=cache_dir(),
        device=device,
        seed=seed,
        limit=limit,
    )
    about = checkpoint.read_facts(at)
    if about.get("mlflow_run_id") and limit is None:  # a part of the data says less
        from pipelines.models.register import store_of
        from pipelines.tracking.client import add_evaluation

        run_uri = at.rpartition("/")[0]
        name = f"evaluation-{about['images_seen']:010d}"
        storage.write_bytes(
            storage.join(run_uri, name, "metrics.json"), Path(out, "metrics.json").read_bytes()
        )
        add_evaluation(
            store_of(about),
            about["mlflow_run_id"],
            found["metrics"],
            about["images_seen"],
            Path(out),
            journals=journal_dir(),
            run_uri=run_uri,
        )
    return found["metrics"]


def main(options: Evaluate) -> dict[str, Any]:
    """Evaluate, or tell the plan, and return what ``--json`` prints."""
    if options.out is None:
        raise UserError("evaluate.py needs --out, a folder for numbers, figures and report.")
    _check_device(options.device)
    uri = _resolve(options.checkpoint)
    about = checkpoint.read_facts(uri)
    data = options.data or about.get("data")
    out = Path(options.out).absolute()
    plan = {
        "checkpoint": uri,
        "images_seen": about["images_seen"],
        "data": None if data is None else storage.absolute(data),
        "out": str(out),
        "device": options.device,
        "seed": options.seed,
        "limit": options.limit,
    }
    if options.dry_run:
        for name, value in plan.items():
            print(f"{name:12} {value}")
        return plan
    metrics = evaluate_checkpoint(
        uri,
        data=plan["data"],
        out=out,
        device=options.device,
        seed=options.seed,
        limit=options.limit,
    )
    report = out / "report.html"
    _tell(metrics, report)
    figures = sorted(str(path) for path in out.glob("*.png"))
    return plan | {"metrics": metrics, "figures": figures, "report": str(report)}


def command() -> None:
    """Run as a program."""
    cli.run(main, Evaluate)


def _resolve(uri: str) -> str:
    """Return the checkpoint that a URI of any kind means."""
    if uri.startswith("models:/"):
        from pipelines.models.pull import checkpoint_of

        uri = checkpoint_of(uri)
    return checkpoint.find(storage.absolute(uri))


def _check_device(device: str) -> None:
    if device != "cpu" and not device.startswith("cuda"):
        raise UserError(f"--device is {device}, but must be cpu or cuda.")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device is {device}, but torch sees no CUDA device; leave it out.")


def _tell(metrics: Mapping[str, float], report: Path) -> None:
    """Print a table of the numbers, each with what to hold it against, and where to look."""
    table = rows(metrics)
    title_width = max(len(title) for title, *_ in table)
    value_width = max(len(value) for _, value, *_ in table)
    for title, value, against, _ in table:
        print(f"{title:{title_width}}  {value:>{value_width}}   {against}")
    print(f"\nWhat they mean, with pictures: {report}")


if __name__ == "__main__":
    command()
