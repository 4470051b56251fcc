"""Ranks that tests start: processes in one Gloo group."""

import gc
import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

multiprocessing.set_forkserver_preload(["ivegan.step"])  # torch is imported once for all ranks


def in_ranks(world: int, call: Callable[..., None], *given: Any) -> None:
    """Call ``call(rank, world, *given)`` on every rank; return when all have ended well."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, f"file://{folder}/store", call, given)
        start_processes(_rank, arguments, nprocs=world, start_method="forkserver")


def _rank(rank: int, world: int, store: str, call: Callable[..., None], given: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    call(rank, world, *given)
    # Networks wrapped for DDP hold the group in cycles. Left to the end of the interpreter, Gloo's
    # threads ask for a lock that is gone by then, and now and then the process aborts.
    gc.collect()
    dist.destroy_process_group()
