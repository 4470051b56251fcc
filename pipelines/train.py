"""Train one preset: Ray Train with DDP over N workers, or a plain loop in this process.

    python pipelines/train.py digits --total-images 100000 --workers 2
    python pipelines/train.py ring --workers 0 --optim.lr_g 1e-4
    ray job submit -- python pipelines/train.py celeba --data s3://bucket/celeba --workers 8 --gpu

The workers compute and write metrics, figures and checkpoints into the run's folder. This process,
the driver, starts them, shows progress from that folder and mirrors it to MLflow, so a dead
tracking server delays no step, and with workers neither does a slow terminal.
"""

import json
from typing import Any

from ivegan.config import PRESETS, Config
from ivegan.errors import UserError
from ivegan.step import NonFiniteLossError
from pipelines import options as cli
from pipelines.cluster.session import Terminated, stopped
from pipelines.digits import prepare_digits
from pipelines.paths import mlflow_place
from pipelines.progress import Display
from pipelines.training.fit import fit
from pipelines.training.plan import Run, resolve


def main(preset: str, config: Config, run: Run) -> dict[str, Any]:
    """Train as the command line says; return what ``--json`` prints."""
    if run.resume and not run.run_id:
        raise UserError("--resume needs --run-id, the run to continue.")
    plan = resolve(preset, config, run)
    if run.dry_run:
        print(json.dumps(plan.describe(), indent=2))
        return plan.describe()
    prepare_digits(plan)
    display = Display(plan)
    print(f"run {plan.run_id}: {preset}, {config.total_steps:,} steps of {config.batch_size}")
    try:
        result = fit(plan, show=display)
    except NonFiniteLossError as error:
        raise UserError(str(error)) from error
    except (KeyboardInterrupt, Terminated) as stop:
        stopped(stop, f"--run-id {plan.run_id} --resume")
    finally:
        display.close()
    print(
        f"{result['images_seen']:,} images seen, {result['images_per_second']:,.0f} images/s by "
        f"{result['world_size']} worker(s); checkpoint {result['checkpoint']}"
    )
    print(f"Runs: {mlflow_place()}")
    return result


def command() -> None:
    """Run from the command line."""
    cli.run_preset(main, Run, PRESETS, default="digits")


if __name__ == "__main__":
    # By its full name, so that Ray's workers find these functions instead of unpickling copies.
    from pipelines.train import command as named_command

    named_command()
