"""The loop of one rank: from the run's last checkpoint to the end of the training."""

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ivegan import checkpoint
from ivegan.data.batches import batches, first_images
from ivegan.data.cache import Split, load_split
from ivegan.data.manifest import read_split_manifest
from ivegan.data.stream import Stream
from ivegan.errors import UserError
from ivegan.evaluation.alarms import SENTENCES, Alarms
from ivegan.evaluation.figures import progress_figures
from ivegan.layers.fast import keep_freed_memory
from ivegan.speed.graph import fastest_update
from ivegan.step import State, create_state, distribute, train
from pipelines.paths import cache_dir
from pipelines.record import RATE, MetricsWriter
from pipelines.training.follow import Event
from pipelines.training.plan import Plan, Run, stream_of

log = logging.getLogger(__name__)


def work(
    plan: Plan,
    metadata: dict[str, Any],
    flushed: Callable[[Event, bool], None] = lambda event, leaves: None,
    preempted: Callable[[], bool] = lambda: False,
) -> None:
    """Train on one rank, from the run's last checkpoint if there is one.

    Rank 0 writes points, figures and checkpoints into the run's folder.

    Args:
        plan, metadata: of the run, and of its checkpoints.
        flushed: called by rank 0 after each flush with its event, and with whether a checkpoint was
            saved because this machine will be taken away.
        preempted: returns, the same on every rank, whether this machine will soon be taken away;
            then a checkpoint is saved at the next flush, once.
    """
    run, config = plan.run, plan.config
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    metadata = {**metadata, "world_size": world_size}
    state = _state(plan)
    source = _training_data(plan)
    pictured = first_images(source, 10) if source is not None and rank == 0 else None
    inputs = batches(config, source, state.step, rank, world_size, state.device)
    save_every = run.save_every or max(1, config.total_images // 10)
    log_every = min(run.log_every or max(1, config.total_images // 100), save_every)
    before, since = state.images_seen, time.perf_counter()
    writer = MetricsWriter(plan.run_uri)
    alarms, noticed = Alarms(config), False
    with contextlib.closing(writer):
        for progress in train(state, inputs, log_every, fastest_update(state)):
            seen = progress.images_seen
            metrics = progress.metrics | {RATE: (seen - before) / (time.perf_counter() - since)}
            save = progress.step == config.total_steps or seen // save_every > before // save_every
            leaves = preempted() and not noticed
            noticed = noticed or leaves
            if rank == 0:
                raised = alarms.of_losses(metrics)
                if save and pictured is not None:
                    raised += alarms.of_networks(state.encoder_generator, pictured)
                for name in raised:
                    log.warning("After %s images: %s.", f"{seen:,}", SENTENCES[name])
                metrics |= {f"alarm/{name}": 1.0 for name in raised} | system_metrics(state.device)
                event: Event = {"images_seen": seen, "metrics": metrics}
                writer.add(seen, metrics)
                if save:
                    shown = state.average or state.encoder_generator  # as an evaluation does
                    figures = progress_figures(shown, config, pictured)
                    for name, png in figures.items():
                        writer.add_figure(name, seen, png)
                if save or leaves:
                    writer.join()  # a resumed run computes no earlier points again
                    event["checkpoint"] = checkpoint.save(state, plan.run_uri, metadata)
                    if run.keep and not config.is_points:  # Figure 2 shows all of them
                        checkpoint.prune(plan.run_uri, run.keep)
                flushed(event, leaves)
            before, since = seen, time.perf_counter()


def _state(plan: Plan) -> State:
    """Return the state to train on from: that of the run's last checkpoint if it has one."""
    run = plan.run
    torch.set_num_threads(run.threads)
    if not run.gpu:
        keep_freed_memory()
        if run.precision == "bfloat16" and not has_bfloat16():
            log.warning(
                "This processor has no units for bfloat16, which is several times slower here than "
                "float32: leave --precision out."
            )
    state = create_state(plan.config, device_of(run), getattr(torch, run.precision))
    state.micro_batches = run.accumulate
    start = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        checkpoint.clear_unfinished(plan.run_uri)
        start = checkpoint.latest(plan.run_uri)
    start = _agree(start)
    if start:
        checkpoint.restore(state, start)
    if run.compile:
        for network in (state.generator_side, state.discriminator_side):
            network.compile(dynamic=False)
    distribute(state)
    return state


def has_bfloat16() -> bool:
    """Return whether this processor computes in bfloat16, as far as torch knows."""
    found = torch.cpu.get_capabilities()
    # On Arm and others torch names other units; there nothing is known to be missing.
    return found["architecture"] != "x86_64" or found["avx512_bf16"] or found["amx_bf16"]


def system_metrics(device: torch.device) -> dict[str, float]:
    """Return the load of this node since the last call, under MLflow's names."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["system/gpu_0_memory_usage_megabytes"] = (total - free) / 1e6
        found["system/gpu_0_memory_usage_percentage"] = 100 * (total - free) / total
    return found


def _training_data(plan: Plan) -> Split | Stream | None:
    """Return what a worker reads; None for points."""
    run = plan.run
    if plan.data_uri is None:
        return None
    if run.stream:
        return stream_of(plan, read_split_manifest(plan.data_uri, "train"))
    return load_split(
        plan.data_uri,
        "train",
        cache_dir(plan.cache_dir),
        skip_bad=run.skip_bad,
        limit=run.cache_gb * 1e9,
    )


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
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]
