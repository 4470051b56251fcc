"""Train one preset: Ray Train with DDP over N workers, or a plain loop in this process.

    python pipelines/train.py digits --total-images 100000 --workers 2
    python pipelines/train.py ring --workers 0 --optim.lr_g 1e-4
    ray job submit -- python pipelines/train.py celeba --data s3://bucket/celeba --workers 8 --gpu

The workers compute and write checkpoints; this process, the driver, starts them, shows progress and
is the only one that talks to MLflow. Workers send it events through a queue, so neither a slow
terminal nor a dead tracking server can hold a step up.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar

import psutil
import torch
import torch.distributed as dist

from data_prep.build import build
from ivegan import checkpoint, storage
from ivegan.config import PRESETS, Config, config_hash, flatten, from_dict, to_dict
from ivegan.data import batches as data
from ivegan.data.batches import CACHE_LIMIT
from ivegan.data.shards import MANIFEST, Manifest, read_manifest
from ivegan.errors import UserError
from ivegan.evaluation.figures import progress_figures
from ivegan.layers import keep_freed_memory
from ivegan.step import NonFiniteLossError, create_state, distribute, train
from pipelines import options as cli

if TYPE_CHECKING:  # it brings MLflow, which takes seconds to import: the driver's business alone
    from pipelines import tracking

log = logging.getLogger(__name__)

T = TypeVar("T")
# No settings of the method, but numbers depend on them.
HOW = ("stream", "precision", "accumulate", "compile")
# A Ray that lives and dies with this process has nobody to report to and no node to lose, and what
# its processes do while they wait is taken from two cores that train. By Ray's default workers are
# the nicest of all; here they are as nice as the others, which then give way (``_give_way``).
QUIET = {
    "RAY_worker_niceness": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
Event = dict[str, Any]
Emit = Callable[[Event], None]
Measure = Callable[[str], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Run(cli.Options):
    """Train one preset of IVE-GAN.

    Settings of the run itself are listed with the others, under dotted names; the options here say
    where and how fast.
    """

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
    workers: int = 2
    """DDP workers of Ray Train; 0 is the plain loop in this process, without Ray."""
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
    run_id: str | None = None
    """Name of the run, its folder in storage; made from preset and time by default."""
    resume: bool = False
    """Continue the run id from its last checkpoint if it has one, start it otherwise."""
    wait_for_nodes: float = 0.0
    """Seconds to wait for a cluster's autoscaler to add what is missing."""
    log_every: int = 0
    """Images between two lines of progress; 0 is a hundredth of the run."""
    save_every: int = 0
    """Images between two checkpoints; 0 is a tenth of the run."""
    parent_run: str | None = None
    """MLflow run to nest this one under."""

    def __post_init__(self) -> None:
        self.at_least(workers=0, threads=1, loaders=0, log_every=0, save_every=0, accumulate=1)

    @property
    def skip_bad(self) -> bool:
        """Whether samples that are not what the manifest says are left out."""
        return self.on_bad_sample == "skip"


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
    tracking_uri: str = dataclasses.field(repr=False)  # it may hold a password
    journal: str
    tags: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of its MLflow run, beside those that every run has."""

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain values, for ``--dry-run``."""
        from pipelines import tracking

        return {
            "preset": self.preset,
            "run_id": self.run_id,
            "run_uri": self.run_uri,
            "data": self.data_uri,
            "tracking_uri": tracking.public(self.tracking_uri),
            "workers": self.run.workers,
            "gpu": self.run.gpu,
            "steps": self.config.total_steps,
            "config": to_dict(self.config),
        }


def runs_dir() -> Path:
    """Return the git-ignored folder of local defaults, ``runs`` below the present folder.

    Raises:
        UserError: the present folder is a throw-away copy that a Ray job was uploaded in.
    """
    here = Path.cwd()
    if "working_dir_files" in here.parts or "_ray_pkg_" in str(here):
        raise UserError(
            "This job runs in a throw-away copy of its working directory: set --storage (and "
            "--data) and MLFLOW_TRACKING_URI to places outside it."
        )
    return here / "runs"


def cache_dir() -> Path:
    """Return this node's folder for decoded images and trained classifiers."""
    if os.environ.get("IVEGAN_CACHE"):
        return Path(os.environ["IVEGAN_CACHE"])
    with contextlib.suppress(UserError):  # in a throw-away copy nothing may be kept
        return runs_dir() / "cache"
    return Path(tempfile.gettempdir()) / f"ivegan-cache-{os.getuid()}"


def journal_dir() -> Path:
    """Return this node's folder of journals."""
    with contextlib.suppress(UserError):  # in a throw-away copy nothing may be kept
        return runs_dir() / "journal"
    return cache_dir() / "journal"


def checkpoints_uri(where: str | None) -> str:
    """Return the absolute place of run folders: the one of ``--storage``, or the local default."""
    return storage.absolute(where or runs_dir() / "checkpoints")


def new_id(what: str) -> str:
    """Return a name that no other run or sweep has."""
    return f"{what}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def resolve(preset: str, config: Config, run: Run) -> Plan:
    """Return the plan of a run; nothing is written or started.

    Raises:
        UserError: settings that cannot work together, or a place that is missing.
    """
    from pipelines import tracking

    share = max(1, run.workers)
    if config.batch_size % (2 * share):
        raise UserError(
            f"batch_size {config.batch_size} cannot be cut into {share} equal, even shares; "
            f"choose a multiple of {2 * share}, or other --workers."
        )
    if config.batch_size % (2 * share * run.accumulate):
        raise UserError(
            f"A worker's {config.batch_size // share} samples of a batch cannot be cut into "
            f"{run.accumulate} equal, even parts; choose another --accumulate."
        )
    run_id = run.run_id or new_id(preset)
    if not run_id.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UserError(f"--run-id {run_id!r} may hold letters, digits, '-', '_' and '.' only.")
    tracking_uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking.default_uri(runs_dir())
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
        run_uri=storage.join(checkpoints_uri(run.storage), run_id),
        data_uri=None if data_uri is None else storage.absolute(data_uri),
        cache_dir=str(cache_dir()),
        tracking_uri=tracking_uri,
        journal=str(journal_dir() / f"{run_id}.jsonl"),
    )


def at(plan: Plan, config: Config, run_id: str, parent_run: str | None = None) -> Plan:
    """Return the plan of another run beside this one: same places, its own settings and name."""
    run = dataclasses.replace(plan.run, parent_run=parent_run or plan.run.parent_run)
    folder, _, _ = plan.run_uri.rpartition("/")
    return dataclasses.replace(
        plan,
        config=config,
        run=run,
        run_id=run_id,
        run_uri=storage.join(folder, run_id),
        journal=str(Path(plan.journal).with_name(f"{run_id}.jsonl")),
    )


def fit(plan: Plan, *, show: Emit | None = None, measure: Measure | None = None) -> dict[str, Any]:
    """Train as planned and return what ``--json`` prints: ids, checkpoint, rate, last metrics.

    Args:
        plan: from ``resolve``.
        show: called with every event, for a terminal; nothing is printed here.
        measure: called with every checkpoint's URI; what it returns is tracked with the losses.

    Raises:
        UserError: the run id exists, the data do not fit or are no longer the same, or the cluster
            is too small.
        NonFiniteLossError: training diverged.
    """
    dataset_hash = check_data(plan)
    known = _earlier_start(plan, dataset_hash)
    asked = None
    if known is None and plan.run.parent_run is None:  # nothing runs yet, so it is told at once
        asked = started(_check_tracking, plan)
    with contextlib.ExitStack() as stack:
        fit_somewhere = work
        if plan.run.workers:  # Ray starts while MLflow is asked
            older = _threads(psutil.Process())
            alone = stack.enter_context(ray_cluster())
            require_resources(plan.run, (lambda line: show({"line": line})) if show else log.info)
            fit_somewhere = functools.partial(_fit_ray, older=older if alone else None)
        if asked is not None:
            answer_of(asked)
        return _tracked(plan, dataset_hash, known, fit_somewhere, show, measure)


def _check_tracking(plan: Plan) -> None:
    """Raise UserError if the tracking store does not answer."""
    from pipelines import tracking  # here, since it takes seconds to import

    tracking.check(plan.tracking_uri)


def _tracked(
    plan: Plan,
    dataset_hash: str,
    known: dict[str, Any] | None,
    fit_somewhere: Callable[[Plan, dict[str, Any], Emit], dict[str, Any]],
    show: Emit | None,
    measure: Measure | None,
) -> dict[str, Any]:
    """Train under an MLflow run that ends as the training does."""
    from pipelines import tracking

    facts = {
        "preset": plan.preset,
        "run_id": plan.run_id,
        "tracking_uri": tracking.public(plan.tracking_uri),
        "data": plan.data_uri,
        "dataset_hash": dataset_hash,
        "config_hash": config_hash(plan.config),
        "git_commit": git_commit(),
        "world_size": max(1, plan.run.workers),
        "threads_per_worker": plan.run.threads,
        "stream": plan.run.stream,
        "precision": plan.run.precision,
        "accumulate": plan.run.accumulate,
        "compile": plan.run.compile,
        "versions": {"torch": torch.__version__},
    }
    if known is None:
        key = tracking.new_key(plan.run_id)
    else:
        key = known.get("run_key", known["mlflow_run_id"])
    facts |= {"run_key": key, "mlflow_run_id": known["mlflow_run_id"] if known else key}
    _write_down(plan, facts)  # before MLflow hears of the run, or a restart could make a second one
    journal = tracking.Journal.open(Path(plan.journal), plan.tracking_uri, key, plan.run_uri)
    facts["mlflow_run_id"] = _start_tracking(plan, facts, journal)
    _write_down(plan, facts)
    tracker = tracking.Tracker(journal)

    def handle(event: Event) -> None:
        """Pass one event on to MLflow and to whoever watches."""
        nonlocal show
        if measure is not None and "checkpoint" in event:
            event["metrics"] |= measure(event["checkpoint"])
        if "metrics" in event:
            tracker.log(event["metrics"], event["images_seen"])
        for name, png in event.get("figures", {}).items():
            tracker.figure(name, png, event["images_seen"])
        try:
            if show is not None:
                show(event)
        except OSError as error:  # a closed pipe, a full disk: no reason to stop training
            show = None
            log.warning("Nothing more is shown (%s); training goes on", error)

    status = "FAILED"
    try:
        with terminated_by_signal(), tracking.system_metrics(tracker):
            result = fit_somewhere(plan, facts, handle)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, Terminated):
        status = "KILLED"
        raise
    finally:
        tracker.close()
        tracking.end_run(plan.tracking_uri, journal.run_id, status, journal)
    return {"run_id": plan.run_id, "mlflow_run_id": journal.run_id, **result}


class Terminated(BaseException):
    """SIGTERM arrived: end the run in order, the last checkpoint stays."""


@contextlib.contextmanager
def terminated_by_signal() -> Iterator[None]:
    """Turn SIGTERM into ``Terminated`` while training; only the main thread can do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stopped(stop: BaseException, flags: str) -> NoReturn:
    """End a command that a signal stopped, with a shell's status for it.

    Args:
        stop: KeyboardInterrupt or Terminated.
        flags: that continue what was stopped.
    """
    print(f"stopped; continue with {flags}", file=sys.stderr)
    by = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    raise SystemExit(128 + by) from None


def check_data(plan: Plan) -> str:
    """Return the hash of the data set, after building digits where they are missing."""
    if plan.data_uri is None:
        return plan.config.dataset  # drawn afresh from its formula, so its name says it all
    from ivegan.networks import sample_shape

    ours = plan.config.dataset == "digits" and plan.run.data is None
    if ours and not storage.exists(storage.join(plan.data_uri, MANIFEST)):
        build("digits", source=None, out=plan.data_uri, workers=0)
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
        _stream(plan, manifest).check(plan.config, max(1, plan.run.workers))
    return manifest.hash


def _earlier_start(plan: Plan, dataset_hash: str) -> dict[str, Any] | None:
    """Return what an earlier start of this run id wrote down, or None.

    Raises:
        UserError: the id is taken and ``--resume`` not given, or settings or data are not the same.
    """
    where = storage.join(plan.run_uri, "run.json")
    if not storage.exists(where):
        return None
    if not plan.run.resume:
        raise UserError(
            f"The run id {plan.run_id} exists in {plan.run_uri}: add --resume to continue it, or "
            "choose another --run-id."
        )
    earlier = json.loads(storage.read_bytes(where))
    before, now = flatten(from_dict(earlier["config"])), flatten(plan.config)
    for name in HOW:
        now[name] = getattr(plan.run, name)
        before[name] = earlier.get(name, getattr(Run, name))
    changed = [k for k in now if now[k] != before[k] and k != "total_images"]
    if changed:
        told = ", ".join(f"{k} was {before[k]} and is {now[k]}" for k in changed)
        raise UserError(f"The run {plan.run_id} cannot be resumed with other settings: {told}.")
    check_same_data(f"The run {plan.run_id}", plan, earlier["dataset_hash"], dataset_hash)
    return earlier


def check_same_data(what: str, plan: Plan, before: str, now: str) -> None:
    """Return if the data are those that a run or sweep was begun on.

    Args:
        what: it is, as the sentence begins.
        plan: of it.
        before, now: hashes of the data set.

    Raises:
        UserError: they are others.
    """
    if before != now:
        raise UserError(
            f"{what} was begun on other data: {plan.data_uri} had the hash {before[:12]} then and "
            f"has {now[:12]} now; give --data as it was, or begin anew under another name."
        )


def _write_down(plan: Plan, facts: dict[str, Any]) -> None:
    """Write what a later start of this run id has to know."""
    marker = json.dumps({**facts, "config": to_dict(plan.config)}, indent=2)
    storage.write_bytes(storage.join(plan.run_uri, "run.json"), marker.encode())


def _start_tracking(plan: Plan, facts: dict[str, Any], journal: "tracking.Journal") -> str:
    """Return the id of the MLflow run: the earlier one of this run id, or a new one."""
    from pipelines import tracking

    return tracking.start_run(
        plan.tracking_uri,
        experiment=f"ivegan-{plan.config.dataset}",
        run_name=plan.run_id,
        params={
            **flatten(plan.config),
            "workers": plan.run.workers,
            "threads": plan.run.threads,
            **{k: facts[k] for k in HOW},
        },
        tags={
            **plan.tags,
            "checkpoints": plan.run_uri,
            **{k: facts[k] for k in ("preset", "git_commit", "config_hash", "dataset_hash")},
        },
        config=to_dict(plan.config),
        dataset=(
            plan.config.dataset,
            facts["dataset_hash"],
            plan.data_uri or plan.config.dataset,
        ),
        parent_run_id=plan.run.parent_run,
        journal=journal,
    )


def _fit_ray(
    plan: Plan, facts: dict[str, Any], handle: Emit, *, older: set[int] | None
) -> dict[str, Any]:
    """Train with Ray's workers, passing their events on as they come.

    ``older`` are this process's threads that do not serve the run; None where Ray serves others.
    """
    import ray.train
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.config import LoggingConfig
    from ray.util.queue import Queue

    from pipelines.training.trainer import Trainer

    def hear(event: Event) -> None:
        nonlocal older
        if older is not None:  # the first event: the workers are there, with their own priority
            _give_way(older)
            older = None
        handle(event)

    queue = Queue(actor_options={"num_cpus": 0})
    failures: list[Exception] = []
    listener = threading.Thread(target=_listen, args=(queue, hear, failures), daemon=True)
    listener.start()
    filesystem, path = storage.filesystem(storage.join(plan.run_uri, "ray"))
    trainer = Trainer(
        _ray_worker,
        alone=older is not None,
        train_loop_config={"plan": plan, "facts": facts, "events": queue.actor},
        scaling_config=ScalingConfig(
            num_workers=plan.run.workers,
            use_gpu=plan.run.gpu,
            resources_per_worker=_needs(plan.run),
        ),
        run_config=RunConfig(
            name=plan.run_id,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=3),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        result = in_a_thread(trainer.fit)
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error
    finally:
        queue.put(None)
        listener.join()
        queue.shutdown(force=True)
    if failures:
        raise failures[0]
    outcome = result.return_value
    assert isinstance(outcome, dict), "rank 0 returns the outcome"
    if "diverged" in outcome:
        raise NonFiniteLossError(outcome["diverged"])
    return outcome


def in_a_thread(call: Callable[[], T], cut: Callable[[], object] | None = None) -> T:
    """Return what a call returns that is made in another thread.

    In the main one Ray Train would take Ctrl-C over, and an exception that a signal raises inside
    Ray gets lost: a terminated run would go on.

    Args:
        call: what to call.
        cut: makes the call end soon. Where a signal ends the main thread's waiting it is called and
            waited for, because Ray aborts a process that uses it while it shuts down.
    """
    outcome = started(call)
    try:
        return answer_of(outcome)
    except (KeyboardInterrupt, Terminated):
        if cut is not None:
            cut()
            wait([outcome], timeout=60)
        raise


def started(call: Callable[..., T], *given: Any) -> Future[T]:
    """Return what a call will have returned that another thread makes; no exit waits for it."""
    outcome: Future[T] = Future()

    def make() -> None:
        try:
            outcome.set_result(call(*given))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=make, daemon=True).start()
    return outcome


def answer_of(outcome: Future[T]) -> T:
    """Return what another thread's call returns, once it does; a signal ends the waiting."""
    # In turns, because a signal that another thread took is looked at only when this one wakes.
    while not wait([outcome], timeout=0.5).done:
        continue
    return outcome.result()


def _give_way(older: set[int]) -> None:
    """Lower the priority of all that serves a run but its workers: processes, and threads here.

    Ranks wait for each other at every step, so whatever takes a core from one of them holds up all.
    Behind them, it takes the moments in which they wait.

    Args:
        older: threads of this process that do not serve the run.
    """
    me = psutil.Process()
    # Workers inherit the raylet's, also one that takes a dead one's place.
    kept = _named("raylet") | _with_children(_named("ray::RayTrainWorker"))
    for process in {me, *me.children(recursive=True)} - kept:
        for thread in _threads(process) - older:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.setpriority(os.PRIO_PROCESS, thread, _BEHIND)


def _named(name: str) -> set[psutil.Process]:
    """Return the processes below this one whose name begins so."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if process.name().startswith(name):
                found.add(process)
    return found


def _with_children(processes: set[psutil.Process]) -> set[psutil.Process]:
    """Return these and all below them."""
    found = set(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= set(process.children(recursive=True))
    return found


def _threads(process: psutil.Process) -> set[int]:
    """Return what has a priority of its own: on Linux every thread, elsewhere the process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {t.id for t in process.threads()} if sys.platform == "linux" else {process.pid}
    return set()


_BEHIND = 19  # a seventieth of the weight of a worker: more than these processes need


def _listen(queue: Any, handle: Emit, failures: list[Exception]) -> None:
    """Handle events until None comes; after the first failure, which is noted, only take them."""
    while (event := queue.get()) is not None:
        if not failures:
            try:
                handle(event)
            except Exception as error:  # of any kind: the driver raises it when the workers end
                failures.append(error)


def _cause(error: Exception) -> Exception:
    """Return the user's mistake behind a failed training, or the failure itself."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, UserError):
                return UserError(str(cause))
            cause = cause.__cause__
    return error


def _ray_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Train on one of Ray's ranks; only rank 0's events and outcome are used."""
    import ray
    import ray.train

    events = payload["events"]
    rank = ray.train.get_context().get_world_rank()
    last: list[Any] = []

    def emit(event: Event) -> None:
        if rank == 0:
            # Not awaited: a slow driver must not hold a step up. Nor Ray Train's own report, which
            # holds every rank up until its controller looks next, 2 s later.
            last[:] = [events.put_nowait.remote(event)]

    try:
        outcome = work(payload["plan"], payload["facts"], emit)
    except NonFiniteLossError as error:
        # Returned, not raised: every retry would diverge again.
        outcome = {"diverged": str(error)}
    ray.get(last)  # the queue holds all events now, before the driver closes it
    return outcome


def work(plan: Plan, facts: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Train on one rank, from the run's last checkpoint if there is one.

    Every rank calls this and emits the same events, rank 0's with figures. Returned are checkpoint,
    images seen, steady rate, world size and the last metrics.
    """
    run, config = plan.run, plan.config
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.set_num_threads(run.threads)
    if not run.gpu:
        keep_freed_memory()
    state = create_state(config, device_of(run), getattr(torch, run.precision))
    state.parts = run.accumulate
    start = _agree(checkpoint.latest(plan.run_uri))
    if start:
        checkpoint.restore(state, start)
    if run.compile:
        for network in (state.players, state.judges):
            network.compile(dynamic=False)
    distribute(state)
    source = _training_data(plan)
    pictured = data.first_images(source, 10) if source is not None and rank == 0 else None
    batches = data.batches(config, source, state.step, rank, world_size, state.device)
    log_every = run.log_every or max(1, config.total_images // 100)
    save_every = run.save_every or max(1, config.total_images // 10)
    saved, before = start, state.images_seen
    clock = Clock(before)
    metrics: dict[str, float] = {}
    for progress in train(state, batches, log_every):
        seen = progress.images_seen
        clock.lap(seen)
        metrics = progress.metrics | {"rate/images_per_second": clock.rate}
        event: Event = {
            "images_seen": seen,
            "total_images": config.total_steps * config.batch_size,
            "metrics": metrics,
        }
        if progress.step == config.total_steps or seen // save_every > before // save_every:
            if rank == 0:
                saved = checkpoint.save(state, plan.run_uri, facts)
                event["figures"] = progress_figures(state.encoder_generator, config, pictured)
            event["checkpoint"] = saved
        emit(event)
        before = seen
        clock.resume()
    return {
        "checkpoint": saved,
        "images_seen": state.images_seen,
        "images_per_second": round(clock.steady_rate, 1),
        "world_size": world_size,
        "metrics": metrics,
    }


def _training_data(plan: Plan) -> data.Split | data.Stream | None:
    """Return what a worker reads; None for points."""
    run = plan.run
    if plan.data_uri is None:
        return None
    if run.stream:
        return _stream(plan, data.read_split_manifest(plan.data_uri, "train"))
    return data.load_split(
        plan.data_uri,
        "train",
        plan.cache_dir,
        skip_bad=run.skip_bad,
        limit=int(run.cache_gb * 1e9),
    )


def _stream(plan: Plan, manifest: Manifest) -> data.Stream:
    assert plan.data_uri is not None
    return data.Stream(
        data_uri=plan.data_uri,
        manifest=manifest,
        split="train",
        loaders=plan.run.loaders,
        skip_bad=plan.run.skip_bad,
    )


@dataclass
class Clock:
    """Times training alone: what happens between ``lap`` and ``resume`` does not count."""

    images: int
    since: float = dataclasses.field(default_factory=time.perf_counter)
    rate: float = 0.0
    steady_images: int = 0
    steady_seconds: float = 0.0
    laps: int = 0

    def lap(self, images_seen: int) -> None:
        """Note that training came this far."""
        seconds = time.perf_counter() - self.since
        images, self.images = images_seen - self.images, images_seen
        self.rate = images / seconds
        self.laps += 1
        if self.laps > 1:  # the first lap holds warm-up
            self.steady_images += images
            self.steady_seconds += seconds

    def resume(self) -> None:
        """Note that training goes on."""
        self.since = time.perf_counter()

    @property
    def steady_rate(self) -> float:
        """Images per second after the first lap, or within it where it was the only one."""
        return self.steady_images / self.steady_seconds if self.steady_seconds else self.rate


def device_of(run: Run) -> torch.device:
    """Return where this process computes.

    Raises:
        UserError: on a GPU, but there is none.
    """
    if not run.gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--gpu was given, but torch sees no CUDA device; leave it out.")
    return torch.device("cuda", torch.cuda.current_device())


def _agree(value: str | None) -> str | None:
    """Return rank 0's value on every rank: a listing may change between two ranks' looks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


@contextlib.contextmanager
def ray_cluster(dashboard: bool = False) -> Iterator[bool]:
    """Attach to the cluster of RAY_ADDRESS, or start a local Ray for as long as it is needed.

    Entering it returns whether Ray was started, so that nobody else uses it.
    """
    # Where a signal ends a run, the thread that it ran in must not start Ray once more.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # read when ray is imported
    import ray

    if ray.is_initialized():
        yield False
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    told = {"logging_level": logging.ERROR, "log_to_driver": False}
    alone = not os.environ.get("RAY_ADDRESS")
    if not alone:
        ray.init(runtime_env={"env_vars": storage.environment()}, **told)
    else:
        for name, value in {**QUIET, **storage.environment()}.items():
            os.environ.setdefault(name, value)  # its processes inherit them
        ray.init(address="local", include_dashboard=dashboard, **told)
    try:
        yield alone
    finally:
        workers = _with_children(_named("raylet")) if alone else set()
        ray.shutdown()
        _end(workers)


def _end(processes: set[psutil.Process]) -> None:
    """Kill what is there of processes that were told to end, after five seconds.

    Ray's workers wait for themselves at their end, now and then, and for ever.
    """

    def alive() -> list[psutil.Process]:
        found = []
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        threading.Event().wait(0.05)  # they are no children of this process, to be waited for
    for process in alive():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def require_resources(run: Run, say: Callable[[str], None]) -> None:
    """Return once the cluster can hold the workers.

    Raises:
        UserError: it cannot, and nothing can add what is missing in time.
    """
    from ray.autoscaler.sdk import request_resources

    need = _needs(run)
    told = " and ".join(f"{v:g} {k}" for k, v in need.items())
    deadline = time.monotonic() + run.wait_for_nodes
    asked = False
    try:
        while (room := _room(need)) < run.workers:
            if not os.environ.get("RAY_ADDRESS") or time.monotonic() >= deadline:
                waited = f" after waiting {run.wait_for_nodes:g} s" if asked else ""
                raise UserError(
                    f"{run.workers} workers of {told} each were asked for, but the cluster has "
                    f"room for {room}{waited}; lower --workers or --threads, or add nodes"
                    + ("." if waited else " (--wait-for-nodes waits for an autoscaler).")
                )
            request_resources(bundles=[need] * run.workers)
            asked = True
            say(f"waiting for nodes: room for {room} of {run.workers} workers of {told} each")
            threading.Event().wait(5)  # the autoscaler offers nothing to wait on
    finally:
        if asked:  # taken back, or the autoscaler would hold the nodes for ever
            request_resources(bundles=[])


def _needs(run: Run) -> dict[str, float]:
    """Return what one worker takes."""
    return {"CPU": float(run.threads)} | ({"GPU": 1.0} if run.gpu else {})


def _room(need: dict[str, float]) -> int:
    """Return how many workers the nodes that are alive can hold, busy or not."""
    import ray

    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return sum(int(min(n.get(k, 0) // v for k, v in need.items())) for n in nodes)


def git_commit() -> str:
    """Return the commit of this code, "-dirty" where files differ, or "unknown" outside git."""
    baked = os.environ.get("IVEGAN_GIT_COMMIT")
    if baked:
        return baked
    here = Path(__file__).resolve().parent
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Display:
    """Shows a run's events: a progress bar in a terminal, plain lines elsewhere.

    A line stands for every checkpoint, and for every twentieth of the run or half minute between.
    """

    def __init__(self, plan: Plan) -> None:
        self.total = plan.config.total_steps * plan.config.batch_size
        self.printed = (0, time.monotonic())  # images, seconds
        self.bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=self.total,
                unit=" images",
                unit_scale=True,
                dynamic_ncols=True,
                file=sys.stdout,
            )

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if "line" in event:
            self._write(event["line"])
        if "metrics" in event:
            saved = event["checkpoint"].rpartition("/")[2] if "checkpoint" in event else ""
            self._progress(event["images_seen"], event["metrics"], saved)

    def close(self) -> None:
        """Leave the terminal in order."""
        if self.bar is not None:
            self.bar.close()

    def _progress(self, seen: int, metrics: dict[str, float], saved: str) -> None:
        rate = metrics["rate/images_per_second"]
        losses = "  ".join(
            f"{told} {metrics[name]:.3f}"
            for told, name in (
                ("D", "loss/D"),
                ("D'", "loss/D_prime"),
                ("GE", "loss/GE_pair"),
                ("G'", "loss/GE_prior"),
            )
        )
        if self.bar is not None:
            self.bar.set_postfix_str(losses, refresh=False)
            self.bar.update(seen - self.bar.n)
            return
        images, seconds = self.printed
        if not saved and seen - images < self.total / 20 and time.monotonic() - seconds < 30:
            return
        self.printed = (seen, time.monotonic())
        left = timedelta(seconds=round((self.total - seen) / rate))
        print(
            f"images {seen:>{len(f'{self.total:,}')},} of {self.total:,}  "
            f"{rate:>7,.0f} images/s  {left} left  "
            f"loss {losses}" + (f"  saved {saved}" if saved else ""),
            flush=True,
        )

    def _write(self, line: str) -> None:
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)


def main(preset: str, config: Config, run: Run) -> dict[str, Any]:
    """Train as the command line says; return what ``--json`` prints."""
    plan = resolve(preset, config, run)
    if run.dry_run:
        print(json.dumps(plan.describe(), indent=2))
        return plan.describe()
    display = Display(plan)
    print(f"run {plan.run_id}: {preset}, {config.total_steps:,} steps of {config.batch_size}")
    try:
        result = fit(plan, show=display)
    except (KeyboardInterrupt, Terminated) as stop:
        stopped(stop, f"--run-id {plan.run_id} --resume")
    finally:
        display.close()
    print(
        f"{result['images_seen']:,} images seen, {result['images_per_second']:,.0f} images/s by "
        f"{result['world_size']} worker(s); checkpoint {result['checkpoint']}"
    )
    return result


def command() -> None:
    """Run from the command line."""
    cli.run_preset(main, Run, PRESETS, default="digits")


if __name__ == "__main__":
    # By its full name, so that Ray's workers find these functions instead of unpickling copies.
    from pipelines.train import command as named_command

    named_command()
