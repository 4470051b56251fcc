"""Cells on disk, one small JSON file each, and how one is computed."""

import dataclasses
import functools
import json
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ivegan import checkpoint, storage
from ivegan.baselines.adversarial import GAN, BiGAN
from ivegan.baselines.autoencoder import Autoencoder, VariationalAutoencoder
from ivegan.baselines.siamese import Siamese, nt_xent, vicreg
from ivegan.baselines.training import Baseline, train
from ivegan.baselines.untrained import pca, random_encoder
from ivegan.config import Config, preset
from ivegan.data.batches import batches
from ivegan.data.cache import load_split
from ivegan.errors import UserError
from ivegan.evaluation import images, points
from ivegan.evaluation.sampling import Sampler
from ivegan.step import NonFiniteLossError
from ivegan.storage import schema
from pipelines.digits import prepare_digits
from pipelines.paths import cache_dir
from pipelines.record import RATE, points_with, read_record, training_seconds
from pipelines.reproduction.tasks import IVE_GAN, Cell
from pipelines.training.fit import fit
from pipelines.training.plan import Run, git_commit, resolve

_METHODS: dict[str, Callable[[Config], Baseline]] = {
    "gan": GAN,
    "pacgan2": functools.partial(GAN, packed=2),
    "bigan": BiGAN,
    "autoencoder": Autoencoder,
    "denoising": functools.partial(Autoencoder, denoising=True),
    "vae": VariationalAutoencoder,
    "simclr": functools.partial(Siamese, compare=nt_xent),
    "vicreg": functools.partial(Siamese, compare=vicreg),
    "random": random_encoder,
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a cell's file holds."""

    task: str
    row: str
    method: str
    seed: int
    config_hash: str
    config: dict[str, Any]
    """Settings that differ from the defaults, under dotted names."""
    preset: str
    images_seen: int
    precision: str
    hardware: str
    train_seconds: float
    commit: str
    torch: str
    failed: str = ""
    """Why there are no metrics."""
    metrics: dict[str, float]


def read(results: Path, cell: Cell) -> Result | None:
    """Return the stored result of a cell, or None; one of other settings counts as missing."""
    path = results / cell.path
    if not path.exists():
        return None
    result = schema.read(path.read_bytes(), Result, str(path), "delete it")
    return result if result.config_hash == cell.hash else None


def write(results: Path, cell: Cell, result: Result) -> None:
    """Write the result of a cell."""
    text = json.dumps(dataclasses.asdict(result), indent=1) + "\n"
    storage.write_bytes(results / cell.path, text.encode())


def compute(cell: Cell, run: Run) -> Result:
    """Train, or continue, and measure a cell; training that diverges is a result too."""
    try:
        if cell.method == IVE_GAN:
            plan = resolve(cell.preset, cell.config, dataclasses.replace(run, run_id=cell.name))
            prepare_digits(plan)
            return recorded(cell, fit(plan)["checkpoint"], run)
        return _baseline(cell, run)
    except NonFiniteLossError as error:
        return _result(cell, run, 0.0, 0, {}, failed=str(error))


def recorded(cell: Cell, checkpoint_uri: str, run: Run) -> Result:
    """Measure a checkpoint of IVE-GAN as the result of a cell."""
    config, encoder, generator, metadata = checkpoint.load_networks(checkpoint_uri)
    found = cell._replace(config=config)
    if found.hash != cell.hash:
        differ = sorted(set(found.settings.items()) ^ set(cell.settings.items()))
        names = ", ".join(dict.fromkeys(name for name, _ in differ))
        raise UserError(f"{checkpoint_uri} is not {cell.name}: it differs in {names}.")
    run_uri = checkpoint_uri.rpartition("/")[0]
    run = dataclasses.replace(run, precision=read_record(run_uri).precision)
    seconds = training_seconds(points_with(run_uri, RATE))
    numbers = _measure(cell, encoder, generator, run)
    return _result(cell, run, seconds, metadata["images_seen"], numbers, metadata["git_commit"])


def _baseline(cell: Cell, run: Run) -> Result:
    """Train a baseline, which takes minutes and is not resumed, and measure it."""
    torch.set_num_threads(run.threads)
    plan = resolve(cell.preset, cell.config, run)
    prepare_digits(plan)
    split = load_split(plan.data_uri, "train", plan.cache_dir) if plan.data_uri else None
    started, seen = time.perf_counter(), 0
    if cell.method == "pca":
        assert split is not None, "PCA is of images"
        method = pca(cell.config, split.images)
    else:
        method = _METHODS[cell.method](cell.config)
    if cell.method not in ("pca", "random"):
        inputs = batches(cell.config, split, 0, 0, 1, torch.device("cpu"))
        method = train(method, inputs, cell.config)
        seen = plan.images
    seconds = time.perf_counter() - started
    return _result(cell, run, seconds, seen, _measure(cell, *method.trained, run))


def _measure(
    cell: Cell, encoder: torch.nn.Module | None, generator: torch.nn.Module | None, run: Run
) -> dict[str, float]:
    """Return the metrics of a cell; the draws are the same for all cells.

    Images are moved by the T of the preset, in a row that trains without it too.
    """
    config, cpu = cell.config, torch.device("cpu")
    plan = resolve(cell.preset, config, run)
    if plan.data_uri is None:
        return points.measure(Sampler(config, encoder, generator, cpu), seed=0)
    config = dataclasses.replace(config, transform=preset(cell.preset).transform)
    sampler = Sampler(config, encoder, generator, cpu, varies=cell.method == IVE_GAN)
    split = images.load(config, plan.data_uri, "test", cache_dir(), None)
    return images.measure(sampler, split, cache_dir(), seed=0)[0]


def _result(
    cell: Cell,
    run: Run,
    seconds: float,
    images_seen: int,
    metrics: dict[str, float],
    commit: str = "",
    failed: str = "",
) -> Result:
    return Result(
        task=cell.task,
        row=cell.row,
        method=cell.method,
        seed=cell.config.seed,
        config_hash=cell.hash,
        config=cell.settings,
        preset=cell.preset,
        images_seen=images_seen,
        precision=run.precision,
        hardware=f"{run.threads} thread(s) of {processor()}",
        train_seconds=round(seconds, 1),
        commit=commit or git_commit(),
        torch=torch.__version__,
        failed=failed,
        metrics={name: round(value, 6) for name, value in sorted(metrics.items())},
    )


def processor() -> str:
    """Return the name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    named = (
        re.search("^model name.*: (.*)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    )
    return named[1].strip() if named else platform.machine()
