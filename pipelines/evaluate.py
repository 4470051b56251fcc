"""Measure a checkpoint or a registered model: numbers, the paper's figures, one HTML page.

    python pipelines/evaluate.py runs/checkpoints/RUN_ID --out runs/reports/RUN_ID
    python pipelines/evaluate.py models:/ivegan-digits-encoder@production --out s3://bucket/report

Digits take half a minute on two cores the first time, when the classifier that reads the images is
trained, and less after that.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ivegan import checkpoint, storage
from ivegan.errors import UserError
from ivegan.evaluation.evaluate import evaluate
from ivegan.evaluation.report import rows
from pipelines import options as cli
from pipelines.paths import mlflow_place

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluate(cli.Options):
    """Measure a checkpoint or a registered model, and draw the paper's figures."""

    checkpoint: str
    """A checkpoint's folder, a run's folder (its newest is taken) or a models:/ URI."""
    out: str | None = None
    """Folder or s3:// URI for metrics.json, the figures and report.html."""
    data: str | None = None
    """Shards to measure on; those that the checkpoint was trained on by default."""
    device: str = "cpu"
    """Where the networks run: cpu or cuda."""
    seed: int = 0
    """Seed of every draw of the evaluation."""
    limit: int | None = None
    """Held-out samples at most; all by default."""
    protocol: Literal["pacgan", "metz", "selfcond"] = "pacgan"
    """Scores of ring and grid as in PacGAN, Unrolled GAN (metz) or Self-conditioned GAN."""


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

    An evaluation without a limit is also copied to the run's folder and to MLflow.

    Args:
        uri: a checkpoint, a run's folder, or a registered model of either half.
        data: shards; those that the checkpoint was trained on by default.
        out: folder or s3:// URI for ``metrics.json``, the figures and ``report.html``.
        device, seed, limit: as for ``ivegan.evaluation.evaluate.evaluate``.

    Raises:
        UserError: as for ``ivegan.evaluation.evaluate.evaluate``.
    """
    return _evaluate(_resolve(uri), data, str(out), device, seed, limit)["metrics"]


def main(options: Evaluate) -> dict[str, Any]:
    """Evaluate, or print the plan, and return what ``--json`` prints."""
    if options.out is None:
        raise UserError("evaluate.py needs --out, a folder for numbers, figures and report.")
    _check_device(options.device)
    uri = _resolve(options.checkpoint)
    metadata = checkpoint.read_metadata(uri)
    data = options.data or metadata.get("data")
    plan = {
        "checkpoint": uri,
        "images_seen": metadata["images_seen"],
        "data": None if data is None else storage.absolute(data),
        "out": storage.absolute(options.out),
        "device": options.device,
        "seed": options.seed,
        "limit": options.limit,
        "protocol": options.protocol,
    }
    if options.dry_run:
        for name, value in plan.items():
            print(f"{name:12} {value}")
        return plan
    settings = options.device, options.seed, options.limit, options.protocol
    result = _evaluate(uri, plan["data"], plan["out"], *settings)
    _print(result["metrics"], result["report"])
    print(f"Runs: {mlflow_place()}")
    figures = sorted(result["figures"].values())
    return plan | {"metrics": result["metrics"], "figures": figures, "report": result["report"]}


def command() -> None:
    """Run as a program."""
    cli.run(main, Evaluate)


def _evaluate(
    uri: str,
    data: str | None,
    out: str,
    device: str,
    seed: int,
    limit: int | None,
    protocol: str = "pacgan",
) -> dict[str, Any]:
    """Evaluate a checkpoint, and copy a whole evaluation to the run's folder and to MLflow."""
    from pipelines.paths import cache_dir

    checkpoint.keep(uri)
    result = evaluate(
        uri,
        data,
        out,
        cache_dir=cache_dir(),
        device=device,
        seed=seed,
        limit=limit,
        protocol=protocol,
    )
    if limit is None and protocol == "pacgan":  # others are not the run's own numbers
        _record(uri, result)
    return result


def _record(uri: str, result: Mapping[str, Any]) -> None:
    """Copy an evaluation's files to the run's folder, and mirror the run."""
    from pipelines import record
    from pipelines.models.register import store_of
    from pipelines.tracking.client import TROUBLE, first_line
    from pipelines.tracking.mirror import mirror

    run_uri, _, name = uri.rpartition("/")
    metadata, out = checkpoint.read_metadata(uri), result["report"].rpartition("/")[0]
    folder = storage.join(run_uri, name.replace("checkpoint", "evaluation"))
    try:
        for path in (*result["figures"].values(), result["report"], f"{out}/metrics.json"):
            data = storage.patiently(storage.read_bytes, path)
            copy = storage.join(folder, path.rpartition("/")[2])
            storage.patiently(storage.write_bytes, copy, data)
    except UserError as error:  # a run of another owner
        log.warning("The evaluation was not copied to %s: %s", folder, error)
    if not record.exists(run_uri):
        return
    try:
        mirror(run_uri, store_of(metadata))
    except TROUBLE as error:
        log.warning(
            "MLflow lacks the evaluation of %s (%s); `registry.py sync` copies it.",
            run_uri,
            first_line(error),
        )


def _resolve(uri: str) -> str:
    """Return the checkpoint that a URI of any kind names."""
    if uri.startswith("models:/"):
        from pipelines.models.pull import checkpoint_of

        uri = checkpoint_of(uri)
    return checkpoint.find(storage.absolute(uri))


def _check_device(device: str) -> None:
    if device != "cpu" and not device.startswith("cuda"):
        raise UserError(f"--device is {device}, but must be cpu or cuda.")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device is {device}, but torch sees no CUDA device; leave it out.")


def _print(metrics: Mapping[str, float], report: str) -> None:
    """Print a table of the numbers, each with what to compare it with, and the page's place."""
    table = rows(metrics)
    title_width = max(len(title) for title, *_ in table)
    value_width = max(len(value) for _, value, *_ in table)
    for title, value, references, _ in table:
        print(f"{title:{title_width}}  {value:>{value_width}}   {references}")
    print(f"\nWhat they mean, with pictures: {report}")


if __name__ == "__main__":
    command()
