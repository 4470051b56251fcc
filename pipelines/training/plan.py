"""What a run is to do, and where: resolved and checked before anything starts."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ivegan import storage
from ivegan.config import Config, to_dict
from ivegan.data.cache import CACHE_LIMIT
from ivegan.data.manifest import Manifest, read_manifest
from ivegan.data.stream import Stream
from ivegan.errors import UserError, public
from ivegan.networks import sample_shape
from ivegan.storage.schema import convert
from pipelines import options as cli
from pipelines.paths import cache_dir, new_id, runs_dir, runs_uri, tracking_uri

log = logging.getLogger(__name__)
_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container


@functools.cache
def default_workers() -> int:
    """Return 2, or 1 where this process may use one CPU and names no cluster."""
    cpus = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError, ValueError):  # no limit, or none that is known
        quota, period = _QUOTA.read_text().split()
        cpus = min(cpus, int(quota) / int(period))
    if cpus >= 2 or os.environ.get("RAY_ADDRESS"):
        return 2
    log.warning("This machine has one CPU: one worker by default instead of two.")
    return 1


def default_wait() -> float:
    """Return the seconds that IVEGAN_WAIT_FOR_NODES names, or 0."""
    text = os.environ.get("IVEGAN_WAIT_FOR_NODES", "0")
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"IVEGAN_WAIT_FOR_NODES is {text!r}, but must be seconds.") from error


class Workers(int):
    """The most workers of a run, with the ``least`` that it starts or continues with."""

    least: int

    @classmethod
    def parse(cls, words: list[str]) -> "Workers":
        """Return the numbers of ``N`` or ``MIN:MAX``.

        Raises:
            ValueError: it is neither.
        """
        least, colon, most = words[0].rpartition(":")
        with contextlib.suppress(ValueError):
            workers = cls(most)
            workers.least = int(least) if colon else workers
            if not colon or 1 <= workers.least <= workers:
                return workers
        raise ValueError(f"{words[0]} is neither N nor MIN:MAX with 1 <= MIN <= MAX.")

    @classmethod
    def flag(cls) -> Any:
        """Return how tyro, imported by commands alone, reads this option."""
        from tyro.constructors import PrimitiveConstructorSpec

        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="N|MIN:MAX",
            instance_from_str=cls.parse,
            is_instance=lambda value: isinstance(value, int),
            str_from_instance=lambda value: [str(value)],
        )


@dataclass(frozen=True, kw_only=True)
class Execution(cli.Options):
    """Where and how fast a run is computed; the same for every command that trains."""

    data: str | None = None
    """Shards, a folder or s3:// URI; digits builds its own on first use, points have none."""
    stream: bool = False
    """Read shards over and over, for data too large to keep decoded on each node."""
    loaders: int = 1
    """With --stream, processes per worker that read ahead; 0 is none."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """Samples that are not what the manifest says: stop, or skip (log and leave them out)."""
    cache_gb: float = CACHE_LIMIT / 1e9
    """Decoded images that a node keeps, in GB; the least recently used data sets go first."""
    storage: str | None = None
    """Where run folders with checkpoints go, a folder or s3:// URI; runs/ by default."""
    workers: int = dataclasses.field(default_factory=default_workers)
    """DDP workers of Ray Train, 1 by default where this machine has one CPU; 0 is the plain loop in
    this process, without Ray."""
    threads: int = 1
    """CPU threads of each worker."""
    gpu: bool = False
    """Give each worker a GPU."""
    compile: bool = False
    """Let torch.compile make the networks of images faster, in a minute that only long runs win
    back; torch keeps what it compiled, so that the next run starts in seconds."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the networks compute in; bfloat16 is faster where the machine has units for it."""
    accumulate: int = 1
    """Parts that each worker's share of a batch is computed in, for the memory of one part."""
    experiment: str = ""
    """MLflow experiment of the run; ivegan-DATASET by default."""
    wait_for_nodes: float = dataclasses.field(default_factory=default_wait)
    """Seconds to wait for a cluster's autoscaler to add what is missing; IVEGAN_WAIT_FOR_NODES, or
    0, by default."""

    def __post_init__(self) -> None:
        self.at_least(workers=0, threads=1, loaders=0, accumulate=1)

    @property
    def worker_resources(self) -> dict[str, float]:
        """Ray's resources of one worker."""
        return {"CPU": float(self.threads)} | ({"GPU": 1.0} if self.gpu else {})

    @property
    def skip_bad(self) -> bool:
        """Whether samples that are not what the manifest says are left out."""
        return self.on_bad_sample == "skip"


@dataclass(frozen=True, kw_only=True)
class Run(Execution):
    """Train one preset of IVE-GAN.

    Settings of the run itself are listed with the others, under dotted names; the options here say
    where and how fast.
    """

    run_id: str | None = None
    """Name of the run, its folder in storage; made from preset and time by default."""
    workers: "Annotated[int, Workers.flag()]" = dataclasses.field(default_factory=default_workers)
    """DDP workers of Ray Train, 1 by default where this machine has one CPU; 0 is the plain loop in
    this process, without Ray. MIN:MAX starts, and continues when a node is lost, with as many as
    divide the batch and find room."""
    resume: bool = False
    """Continue the run id from its last checkpoint if it has one, start it otherwise."""
    log_every: int = 0
    """Images between two flushes of metrics; 0 is a hundredth of the run."""
    keep: int = 3
    """Last checkpoints that a run of images keeps, beside those that were evaluated or registered;
    0 is all."""
    save_every: int = 0
    """Images between two checkpoints; 0 is a tenth of the run."""
    parent_run: str | None = None
    """MLflow run to nest this one under."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(log_every=0, save_every=0, keep=0)


def sizes_of(config: Config, run: Run) -> list[int]:
    """Return the numbers of workers that can share a batch, largest first; one unless elastic."""
    least, unit = getattr(run.workers, "least", run.workers), 2 * run.accumulate
    sizes = range(run.workers, least - 1, -1)
    return [n for n in sizes if config.batch_size % (unit * max(1, n)) == 0]


def run_of(execution: Execution, **own: Any) -> Run:
    """Return the options of a run that is computed as another command's options define."""
    return Run(**shared(execution) | own)


def shared(execution: Execution) -> dict[str, Any]:
    """Return the options of an execution by name, without those of the command."""
    names = {f.name for f in dataclasses.fields(Execution)}
    names -= {f.name for f in dataclasses.fields(cli.Options)}
    return {name: getattr(execution, name) for name in sorted(names)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run resolved: every place absolute, so that it means the same on any node."""

    preset: str
    config: Config
    run: Run
    run_id: str
    run_uri: str
    data_uri: str | None
    cache_dir: str
    """Of the driver; a node whose environment names another uses that."""
    tracking_uri: str = dataclasses.field(repr=False)  # it may hold a password
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of its MLflow run, beside those that every run has."""

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment."""
        return self.run.experiment or f"ivegan-{self.config.dataset}"

    def of_size(self, workers: int) -> "Plan":
        """Return this plan with so many workers."""
        return dataclasses.replace(self, run=dataclasses.replace(self.run, workers=workers))

    @property
    def images(self) -> int:
        """Images that are seen when the run is finished: whole batches of them."""
        return self.config.total_steps * self.config.batch_size

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values, for ``--dry-run``."""
        sizes = sizes_of(self.config, self.run)
        return {
            "preset": self.preset,
            "run_id": self.run_id,
            "run_uri": self.run_uri,
            "data": self.data_uri,
            "tracking_uri": public(self.tracking_uri),
            "workers": self.run.workers if len(sizes) == 1 else sizes,
            "gpu": self.run.gpu,
            "steps": self.config.total_steps,
            "config": to_dict(self.config),
        }


def resolve(preset: str, config: Config, run: Run) -> Plan:
    """Return the plan of a run; nothing is written or started.

    Raises:
        UserError: settings that cannot work together, or a place that is missing.
    """
    try:
        convert(to_dict(config), Config)
    except ValueError as error:
        raise UserError(f"A setting of {preset} is not possible: {error}.") from error
    parts = max(1, run.workers) * run.accumulate
    if not sizes_of(config, run):
        raise UserError(
            f"batch_size {config.batch_size} cannot be cut into {parts} equal, even parts; choose "
            f"a multiple of {2 * parts}, or other --workers or --accumulate."
        )
    if run.compile and (config.objective.r1 or config.objective.r2):
        raise UserError(
            f"--compile cannot compute the gradient penalties of {preset}: leave it out, or set "
            "--objective.r1 0 and --objective.r2 0."
        )
    run_id = run.run_id or new_id(preset)
    if not re.fullmatch(r"[\w.-]*\w[\w.-]*", run_id):
        raise UserError(f"--run-id {run_id!r} may hold letters, digits, '-', '_' and '.' only.")
    data_uri = run.data
    if data_uri is None and config.dataset == "digits":
        data_uri = str(runs_dir() / "data" / "digits")
    if data_uri is None and not config.is_points:
        raise UserError(
            f"The preset {preset} needs --data, a folder or s3:// URI that "
            f"`python data_prep/build.py {config.dataset}` has written."
        )
    return Plan(
        preset=preset,
        config=config,
        run=run,
        run_id=run_id,
        run_uri=storage.join(runs_uri(run.storage), run_id),
        data_uri=None if data_uri is None else storage.absolute(data_uri),
        cache_dir=str(cache_dir()),
        tracking_uri=tracking_uri(),
    )


def beside(plan: Plan, config: Config, run_id: str, parent_run: str | None = None) -> Plan:
    """Return the plan of another run beside this one: same places, its own settings and name."""
    run = dataclasses.replace(plan.run, parent_run=parent_run or plan.run.parent_run)
    uri = storage.join(plan.run_uri.rpartition("/")[0], run_id)
    return dataclasses.replace(plan, config=config, run=run, run_id=run_id, run_uri=uri)


def check_data(plan: Plan) -> str:
    """Check that the data fit the plan, and return the hash of the data set."""
    if plan.data_uri is None:
        return plan.config.dataset  # drawn afresh from its formula, so its name says it all
    manifest = read_manifest(plan.data_uri)
    shape = sample_shape(plan.config.model)
    if tuple(manifest.image_shape) != shape:
        raise UserError(
            f"The images of {plan.data_uri} are {tuple(manifest.image_shape)}, but the networks of "
            f"{plan.preset} take {shape}; choose the preset of that data set, or build it again."
        )
    if manifest.splits.get("train", 0) < 2:
        raise UserError(f"{plan.data_uri} has no train samples: build the data set again.")
    if plan.run.stream:
        for workers in sizes_of(plan.config, plan.run):
            stream_of(plan, manifest).check(plan.config, max(1, workers))
    return manifest.hash


def check_same_data(what: str, plan: Plan, before: str, now: str) -> None:
    """Return if the data are those that a run or sweep was begun on.

    Raises:
        UserError: they are others.
    """
    if before != now:
        raise UserError(
            f"{what} was started on different data: {plan.data_uri} had the hash {before[:12]} "
            f"then and has {now[:12]} now; give --data as it was, or start anew under another name."
        )


def stream_of(plan: Plan, manifest: Manifest) -> Stream:
    assert plan.data_uri is not None
    return Stream(
        data_uri=plan.data_uri,
        manifest=manifest,
        split="train",
        loaders=plan.run.loaders,
        skip_bad=plan.run.skip_bad,
    )


def git_commit() -> str:
    """Return what identifies this code: its commit, "-dirty" where files differ, or its own hash.

    A job's uploaded code is identified by Ray's hash of it, not by the commit of the image.
    """
    if named := os.environ.get("IVEGAN_GIT_COMMIT"):
        return named
    here = Path(__file__).resolve().parents[2]
    if uploaded := re.search(r"_ray_pkg_([0-9a-f]+)", str(here)):
        return f"package-{uploaded[1]}"
    if image := os.environ.get("IVEGAN_IMAGE_COMMIT"):
        return image
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        names = sorted(path for p in ("ivegan", "pipelines") for path in (here / p).rglob("*.py"))
        return f"code-{hashlib.sha256(b''.join(p.read_bytes() for p in names)).hexdigest()[:40]}"
