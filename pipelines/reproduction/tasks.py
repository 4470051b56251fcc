"""What is reproduced: tasks, each a table of rows, each row a method with its settings."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ivegan.config import Config, flatten, override, preset
from ivegan.errors import UserError
from ivegan.storage.digest import digest

IVE_GAN = "ive-gan"
_POINTS = "modes high_quality reverse_kl std_ratio right_mode residual_std_ratio"
_CLASSES = (
    "same_class one_nn linear_probe few_labels kmeans_accuracy kmeans_nmi retrieval "
    "variation_ratio frechet frechet_fitted frechet_recon"
)
_FACES = "same_attributes attribute_auroc attribute_ap retrieval frechet frechet_recon"
# Methods without discriminators take Adam's usual settings instead of the preset's.
_ADAM = {"optim.lr_g": 1e-3, "optim.beta1": 0.9, "optim.beta2": 0.999}


class Variant(NamedTuple):
    """A row of a table: a method and its settings."""

    title: str
    preset: str
    changes: Mapping[str, Any] = {}
    method: str = IVE_GAN


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table, of cells (row, seed)."""

    name: str
    title: str
    rows: Mapping[str, Variant]
    metrics: tuple[str, ...] = tuple(_CLASSES.split())
    """Columns."""
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of all rows, the same budget and width."""
    quick: Mapping[str, Any] | None = None
    """Settings of the reduced table, of one seed; None where there is none."""


class Cell(NamedTuple):
    """One computation of a table."""

    task: str
    row: str
    method: str
    preset: str
    config: Config

    @property
    def name(self) -> str:
        """Return the name of its file and of its run."""
        return f"{self.task}-{self.row}-s{self.config.seed}"

    @property
    def path(self) -> str:
        """Return its place below the folder of results."""
        return f"{self.task}/{self.row}-s{self.config.seed}.json"

    @property
    def settings(self) -> dict[str, Any]:
        """Return what differs from the defaults of ``Config``, under dotted names."""
        defaults = flatten(Config())
        return {k: v for k, v in flatten(self.config).items() if v != defaults[k]}

    @property
    def hash(self) -> str:
        """Return the hash of method and settings; a new setting that is off does not change it."""
        return digest([self.method, self.config.protocol, self.settings])[:16]


def cells(task: Table, seeds: tuple[int, ...] = (), rows: tuple[str, ...] = ()) -> list[Cell]:
    """Return the cells of a task, row by row; of these rows and seeds where any are given."""
    for name in rows:
        if name not in task.rows:
            raise UserError(f"{task.name} has no row {name!r}; it has {', '.join(task.rows)}.")
    return [
        Cell(task.name, name, row.method, row.preset, _config(task, row, seed))
        for name, row in task.rows.items()
        if not rows or name in rows
        for seed in seeds or task.seeds
    ]


def _config(task: Table, row: Variant, seed: int) -> Config:
    return override(preset(row.preset), {**task.settings, **row.changes, "seed": seed})


def task_of(name: str, quick: bool = False) -> Table:
    """Return the task of that name, or its reduced table; raises UserError with the names."""
    if name not in TASKS:
        raise UserError(f"There is no task {name!r}; choose from {', '.join(TASKS)}.")
    task = TASKS[name]
    if not quick:
        return task
    if task.quick is None:
        raise UserError(f"{name} has no --quick table; these have: {', '.join(QUICK)}.")
    settings = {**task.settings, **task.quick}
    return dataclasses.replace(task, name=f"{name}-quick", settings=settings, seeds=(0,))


def _representations(presets: Mapping[str, str], network: str) -> dict[str, Variant]:
    """Return IVE-GAN of several presets, and all baselines with the networks of ``network``."""
    return {
        **{name: Variant(f"IVE-GAN, `{key}`", key) for name, key in presets.items()},
        "bigan": Variant("BiGAN / ALI", network, {}, "bigan"),
        "autoencoder": Variant("autoencoder", network, _ADAM, "autoencoder"),
        "denoising": Variant("autoencoder, T(x) to x", network, _ADAM, "denoising"),
        "vae": Variant("variational autoencoder", network, _ADAM, "vae"),
        "simclr": Variant("SimCLR", network, _ADAM, "simclr"),
        "vicreg": Variant("VICReg", network, _ADAM, "vicreg"),
        "pca": Variant("PCA", network, {}, "pca"),
        "random": Variant("random encoder", network, {}, "random"),
    }


def _points(dataset: str) -> dict[str, Variant]:
    plus = f"{dataset}-plus"
    return {
        "paper": Variant(f"IVE-GAN, `{dataset}`", dataset),
        "plus": Variant(f"IVE-GAN, `{plus}`", plus),
        "gan": Variant("GAN", plus, {}, "gan"),
        "pacgan2": Variant("PacGAN2", plus, {}, "pacgan2"),
        "bigan": Variant("BiGAN / ALI", plus, {}, "bigan"),
    }


def _without(name: str) -> dict[str, Variant]:
    """Return the recipe of images, and the same with each ingredient left out in turn."""
    return {
        "plus": Variant(f"`{name}`", name),
        "no-d-prime": Variant("without D'", name, {"objective.prior_weight": 0.0}),
        "no-t": Variant("without T", name, {"transform.shift": 0.0, "transform.rotate": 0.0}),
        "no-mismatched": Variant("without mismatched pairs", name, {"objective.mismatched": 0.0}),
        "no-difference": Variant("D sees no differences", name, {"model.pair_features": "concat"}),
        "no-norm": Variant("without batch norm in E and G", name, {"model.norm": "none"}),
        "no-encoder-t": Variant("E sees x, not T(x)", name, {"transform.encoder": False}),
        "no-invariance": Variant(
            "without the invariance loss", name, {"objective.invariance": 0.0}
        ),
        "nonsaturating": Variant("not relativistic", name, {"objective.loss": "nonsaturating"}),
        "no-penalties": Variant("without R1, R2", name, {"objective.r1": 0.0, "objective.r2": 0.0}),
        "constant-rate": Variant("constant learning rates", name, {"optim.schedule": "constant"}),
        "no-ema": Variant("without averaged weights", name, {"optim.ema": 0.0}),
    }


def _readings() -> dict[str, Variant]:
    """Return the readings of Table 1 and of Eqs. 3 and 4 that change numbers."""
    std, name = preset("ring").transform.noise_std, "ring"
    return {
        "paper": Variant("`ring`", name),
        "z3": Variant("z of 3 entries", name, {"model.z_dim": 3}),
        "minimax": Variant("Eq. 3 to the letter, minimax", name, {"objective.loss": "minimax"}),
        "half-std": Variant("T of half the std", name, {"transform.noise_std": std / 2**0.5}),
        "no-d-prime": Variant("without D'", name, {"objective.prior_weight": 0.0}),
        "no-t": Variant("without T", name, {"transform.noise_std": 0.0}),
    }


_DIGITS = {"digits": "digits", "plus": "digits-plus"}
_MNIST = {"paper": "mnist", "plus": "mnist-plus"}
_UNALIGNED = {"objective.alignment": 0.0}
_LATENT = {"objective.latent": 1.0} | _UNALIGNED
_BUDGET = {"model.width": 0.25, "total_images": 600_000}

TASKS = {
    task.name: task
    for task in (
        Table(
            name="ring",
            title="Fig. 2, eight Gaussians",
            rows=_points("ring"),
            metrics=tuple(_POINTS.split()),
            seeds=tuple(range(10)),
            settings={"protocol": "pacgan"},
            quick={"total_images": 2000 * 512, "batch_size": 512},
        ),
        Table(
            name="grid",
            title="25 Gaussians",
            rows=_points("grid"),
            metrics=tuple(_POINTS.split()),
            seeds=tuple(range(10)),
            settings={"protocol": "pacgan"},
        ),
        Table(
            name="ablations-ring",
            title="Readings of Table 1 on the ring",
            rows=_readings(),
            metrics=tuple(_POINTS.split()),
            seeds=tuple(range(5)),
            settings={"protocol": "pacgan"},
        ),
        Table(
            name="digits",
            title="1,797 digits of 8x8 pixels, half the width, 100,000 images seen",
            rows=_representations(_DIGITS, "digits-plus"),
            seeds=tuple(range(5)),
            settings={"model.width": 0.5, "total_images": 100_000},
            quick={"total_images": 30_000},
        ),
        Table(
            name="ablations-digits",
            title="`digits-plus` with an ingredient left out, half the width, 50,000 images seen",
            rows=_without("digits-plus"),
            settings={"model.width": 0.5, "total_images": 50_000},
        ),
        Table(
            name="mnist-z16",
            title="MNIST, z of 16 entries, a quarter of the width, 600,000 images seen",
            rows=_representations(_MNIST, "mnist-plus"),
            settings=_BUDGET,
        ),
        Table(
            name="mnist-z3",
            title="MNIST, z of 3 entries, a quarter of the width, 600,000 images seen",
            rows=_representations(_MNIST, "mnist-plus")
            # So few entries saturate without it.
            | {"plus": Variant("IVE-GAN, `mnist-plus`, latent term", "mnist-plus", _LATENT)},
            settings={**_BUDGET, "model.z_dim": 3},
        ),
        Table(
            name="ablations-mnist",
            title="`mnist-plus` with an ingredient left out, width 0.25, 300,000 images",
            rows=_without("mnist-plus")
            | {"no-alignment": Variant("without the alignment loss", "mnist-plus", _UNALIGNED)},
            settings={"model.width": 0.25, "total_images": 300_000},
        ),
        Table(
            name="celeba",
            title="Faces of 128x128 pixels, a quarter of the width, 500,000 images seen",
            rows=_representations({"paper": "celeba", "plus": "celeba-plus"}, "celeba-plus"),
            metrics=tuple(_FACES.split()),
            seeds=(0,),
            settings={"model.width": 0.25, "total_images": 500_000},
        ),
    )
}
"""All tables by name."""

QUICK = [name for name, task in TASKS.items() if task.quick is not None]
"""The tables that ``--quick`` computes."""
