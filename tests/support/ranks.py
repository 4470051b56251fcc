"""Ranks that tests start: processes in one Gloo group over loopback."""

import gc
import multiprocessing
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from processes import free_ports


def in_ranks(world: int, call: Callable[..., None], *given: Any) -> None:
    """Call ``call(rank, world, *given)`` on every rank; return when all have ended well."""
    (port,) = free_ports(1)
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(r, world, port, call, given)) for r in range(world)
    ]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(120)
        assert p.exitcode == 0


def _rank(rank: int, world: int, port: int, call: Callable[..., None], given: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    call(rank, world, *given)
    # Networks wrapped for DDP hold the group in cycles. Left to the end of the interpreter, Gloo's
    # threads ask for a lock that is gone by then, and now and then the process aborts.
    gc.collect()
    dist.destroy_process_group()
