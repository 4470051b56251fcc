"""Measure a checkpoint or a registered model: numbers, the paper's figures, one HTML page.

    python pipelines/evaluate.py runs/checkpoints/RUN_ID --out runs/reports/RUN_ID
    python pipelines/evaluate.py models:/ivegan-digits-encoder@production --out s3://bucket/report

Digits take half a minute on two cores the first time, when the classifier that reads the images is
trained, and less after that.
"""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ivegan import checkpoint, storage
from ivegan.errors import UserError
from ivegan.evaluation.evaluate import evaluate
from ivegan.evaluation.report import rows
from pipelines import options as cli
from pipelines.paths import cache_dir, mlflow_place, present

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluate(cli.Options):
    """Measure a checkpoint or a registered model, and draw the paper's figures."""

    checkpoint: str
    """A checkpoint's folder, a run's folder (its newest is taken) or a models:/ URI, of which the
    checkpoint is measured: registration has compared the two."""
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
    protocol: Literal["pacgan", "metz", "selfcond"] | None = None
    """Scores of ring and grid as in PacGAN, Unrolled GAN (metz) or Self-conditioned GAN; those of
    the protocol that the run was trained for by default."""


def evaluate_checkpoint(options: Evaluate) -> dict[str, Any]:
    """Measure a checkpoint and return what ``ivegan.evaluation.evaluate.evaluate`` returns.

    The run's own numbers, of all held-out samples of the data that it was trained on, are also
    copied to its folder and to MLflow.
    """
    assert options.out is not None, "a place for the report"
    uri = options.checkpoint
    checkpoint.keep(uri)
    with storage.longer_retries():
        result = evaluate(
            uri,
            options.data,
            options.out,
            cache_dir=cache_dir(),
            device=options.device,
            seed=options.seed,
            limit=options.limit,
            protocol=options.protocol,
        )
        metadata = result["metadata"]
        same_data = metadata["dataset_hash"] in (None, metadata["evaluated_dataset_hash"])
        if same_data and (options.limit, options.protocol, options.seed) == (None, None, 0):
            _record(uri, result)
    return result


def main(options: Evaluate) -> dict[str, Any]:
    """Evaluate, or print the plan, and return what ``--json`` prints."""
    if options.out is None:
        raise UserError("evaluate.py needs --out, a folder for numbers, figures and report.")
    options.at_least(seed=0)
    _check_device(options.device)
    uri = _resolve(options.checkpoint)
    metadata = checkpoint.read_metadata(uri)
    data = options.data or present(metadata.get("data") or "")
    options = dataclasses.replace(
        options,
        checkpoint=uri,
        data=storage.absolute(data) if data else None,
        out=storage.absolute(options.out),
    )
    names = ("checkpoint", "data", "out", "device", "seed", "limit", "protocol")
    plan = {name: getattr(options, name) for name in names}
    plan["images_seen"] = metadata["images_seen"]
    if options.dry_run:
        print("\n".join(cli.aligned([(name, str(value)) for name, value in plan.items()])))
        return plan
    result = evaluate_checkpoint(options)
    lines = [(row.meaning.title, row.value, row.compare) for row in rows(result["metrics"])]
    print("\n".join(cli.aligned(lines, right=(1,))))
    print(f"\nWhat they mean, with pictures: {result['report']}")
    print(f"Runs: {mlflow_place()}")
    figures = sorted(result["figures"].values())
    return plan | {"metrics": result["metrics"], "figures": figures, "report": result["report"]}


def command() -> None:
    """Run as a program."""
    cli.run(main, Evaluate)


def _record(uri: str, result: Mapping[str, Any]) -> None:
    """Copy an evaluation's files to the run's folder, and mirror the run."""
    from pipelines import record
    from pipelines.tracking.mirror import forget, mirror_or_warn, store_of

    run_uri = uri.rpartition("/")[0]
    folder = record.evaluation_uri(run_uri, result["metadata"]["images_seen"])
    try:
        for name, content in result["files"].items():
            storage.write_bytes(storage.join(folder, name), content)
        forget(run_uri, folder)  # an earlier one of this checkpoint
    except UserError as error:  # a run of another owner
        log.warning("The evaluation was not copied to %s: %s", folder, error)
    if record.exists(run_uri):
        noted = checkpoint.read_metadata(uri).get("tracking_uri", "")  # by version 0.1
        mirror_or_warn(run_uri, store_of(run_uri, noted), "this evaluation")


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


if __name__ == "__main__":
    command()
