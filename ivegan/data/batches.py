"""Batches and draws of one step after the other, from a cached split, a stream or points.

The position of each sample in a batch is defined in ``order``, the same for cache and stream.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ivegan import order
from ivegan.config import Config
from ivegan.data.cache import Split
from ivegan.data.stream import Stream, reading_threads
from ivegan.data.tars import read_shard
from ivegan.errors import UserError
from ivegan.shapes import UInt8
from ivegan.transforms import to_float

T = TypeVar("T")

_BATCHES_AHEAD = 2


def batches(
    config: Config,
    source: Split | Stream | None,
    step: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, order.Draws]]:
    """Yield a rank's samples, floats in [0, 1] or points, and draws of one step after the other.

    They are prepared in a thread, some steps ahead, except points on a CPU.

    Without a source, points of ``ring`` or ``grid`` are drawn. Copies to the device are
    asynchronous.
    """
    pin = device.type == "cuda"

    def prepared() -> Iterator[tuple[Tensor, order.Draws]]:
        streamed = (
            source.batches(config, step, rank, world_size) if isinstance(source, Stream) else None
        )
        for current in itertools.count(step):
            draws = order.draw(config, current, rank, world_size)
            if streamed is not None:
                x = next(streamed)
            elif isinstance(source, Split):
                x = source.batch(config, current, rank, world_size)
            else:
                x = order.points(config, current, rank, world_size)
            if pin:
                x, draws = x.pin_memory(), order.Draws(*(tensor.pin_memory() for tensor in draws))
            yield x, draws

    # Points on a CPU wait for no reading; a second thread would slow the step down.
    in_place = source is None and device.type == "cpu"
    for x, draws in prepared() if in_place else _ahead(prepared(), _BATCHES_AHEAD):
        x = x.to(device, non_blocking=True)
        yield (x if source is None else to_float(x)), draws.to(device)


def first_images(source: Split | Stream, count: int) -> UInt8[np.ndarray, "n c h w"]:
    """Return the first images of the first readable shard, for figures."""
    if isinstance(source, Split):
        return source.images[:count]
    manifest = source.manifest
    for shard in manifest.of_split(source.split):
        samples = read_shard(source.data_uri, shard, manifest.image_shape, skip_bad=source.skip_bad)
        if samples:
            return np.stack([sample.image for sample in samples[:count]])
    raise UserError(f"{source.data_uri} has no readable {source.split} sample: build it again.")


def _ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """Yield the items of an endless iterator, which a thread computes ``count`` items ahead."""
    with reading_threads(1) as pool:
        pending = deque(pool.submit(next, items) for _ in range(count))
        while True:
            item = pending.popleft().result()
            pending.append(pool.submit(next, items))
            yield item
