"""Search learning rates and latent sizes with Ray Tune, by quality measured on held-out data.

    python pipelines/tune.py ring --samples 12
    python pipelines/tune.py mnist --data runs/data/mnist --search grid --samples 3 \\
        --space "model.z_dim=2,3,8,16,32 model.noise_dim=" --total-images 100000
    python pipelines/tune.py --restore sweep-ring-20261123-101500

A trial is a training run with the same loop, checkpoints and tracking, named after sweep and trial.
Trials are compared by a score on the validation split, never by a loss. ASHA stops weak trials
early; MLflow shows one parent run per sweep and one child run per trial.
"""

import dataclasses
import shlex
from typing import Any

from ivegan.config import PRESETS, Config
from ivegan.errors import UserError
from pipelines import options as cli
from pipelines.cluster.session import Terminated, stopped
from pipelines.paths import mlflow_place, new_id
from pipelines.sweeps.definition import Sweep, restored


def main(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Search, print the table and the best trial, and return the JSON object."""
    if options.resume and not options.sweep_id:
        raise UserError("--resume needs --sweep-id, the sweep to continue.")
    if options.restore:
        preset, config, options = restored(options)
    name = options.sweep_id or new_id(f"sweep-{preset}")
    options = dataclasses.replace(options, sweep_id=name)
    try:
        return _search(preset, config, options)
    except (KeyboardInterrupt, Terminated) as stop:
        words = ["--restore", name]
        words += ["--storage", options.storage] if options.storage else []
        if options.retrain:
            words += ["--retrain", "--retrain-images", str(options.retrain_images)]
        stopped(stop, shlex.join(words))


def _search(preset: str, config: Config, options: Sweep) -> dict[str, Any]:
    """Run the sweep, print its result, and train the best if requested."""
    from pipelines.sweeps import driver, report

    result = driver.sweep(preset, config, options)
    if options.dry_run:
        return result
    print("\n" + "\n".join(report.table(result)))
    print(f"\nFigure: {result['figure']}")
    print(f"Runs: {mlflow_place()}")
    print(f"Train the best at full length with\n  {result['command']}")
    if options.retrain:
        result = {**result, "retrained": driver.retrain(preset, config, options, result)}
        for name in result["retrained"]["registered"]["names"]:
            print(f"Registered: models:/{name}@staging")
    return result


def command() -> None:
    """Run from the command line."""
    cli.run_preset(main, Sweep, PRESETS, default="ring")


if __name__ == "__main__":
    command()
