"""A split read from its shards in processes that read ahead, for data that fit on no disk."""

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ivegan import order
from ivegan.config import Config
from ivegan.data.manifest import Manifest
from ivegan.data.tars import read_shard
from ivegan.errors import UserError
from ivegan.shapes import UInt8


@contextmanager
def reading_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads that a generator reads with, and do not wait for them at its end.

    The garbage collector may close an abandoned generator in one of its own threads, which cannot
    wait for itself.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One split, read from its shards again in every epoch."""

    data_uri: str
    manifest: Manifest
    split: str
    loaders: int = 1
    """Processes that read ahead for each rank; 0 reads in the rank's own."""
    skip_bad: bool = False
    """Leave out samples that differ from the manifest, instead of stopping."""

    def batches(
        self, config: Config, step: int, rank: int, world_size: int
    ) -> Iterator[UInt8[Tensor, "n c h w"]]:
        """Yield a rank's slice of one global batch after the other, indefinitely.

        The batches are the same for any number of ranks and loaders, and start at any step without
        reading the steps before it. Each rank holds two shards per lane of its own in memory.

        Raises:
            UserError: fewer lanes of shards than ranks, or a shard that differs from the manifest.
        """
        lanes = self.check(config, world_size)
        share = lanes // world_size
        rank_lanes = range(rank * share, (rank + 1) * share)
        reader: Iterable[Tensor | UserError] = _Lanes(self, config, step, rank_lanes, lanes)
        loaders = 1
        if self.loaders:
            loaders = math.gcd(share, self.loaders)
            # Not forked: a rank has threads of Ray and gloo, whose locks a fork would copy.
            reader = DataLoader(
                reader,
                batch_size=None,
                num_workers=loaders,
                prefetch_factor=4,
                multiprocessing_context="forkserver",
            )
        # A DataLoader takes from its processes in turn, so each round is one batch, in order.
        pieces = iter(reader)
        while True:
            batch = []
            for piece in itertools.islice(pieces, loaders):
                if isinstance(piece, UserError):
                    raise piece
                batch.append(piece)
            yield torch.cat(batch)

    def check(self, config: Config, world_size: int) -> int:
        """Check that a global batch can be cut into the ranks, and return its number of lanes.

        Raises:
            UserError: it cannot.
        """
        shards = len(self.manifest.of_split(self.split))
        lanes = order.num_lanes(shards, config.batch_size)
        if lanes % world_size:
            raise UserError(
                f"{self.data_uri} has {shards} shards of {self.split}, which with batch_size "
                f"{config.batch_size} can be streamed by 1 to {lanes} workers, a power of two, not "
                f"by {world_size}: build it with a smaller --shard-size, or leave --stream out."
            )
        return lanes


class _Lanes(IterableDataset):
    """Some of the lanes of a stream, as a loader's process reads them."""

    def __init__(
        self, stream: Stream, config: Config, step: int, rank_lanes: range, lanes: int
    ) -> None:
        self.stream, self.seed, self.rank_lanes, self.lanes = stream, config.seed, rank_lanes, lanes
        self.width = config.batch_size // lanes
        self.skip = step * self.width
        self.shards = stream.manifest.of_split(stream.split)

    def __iter__(self) -> Iterator[UInt8[Tensor, "n c h w"] | UserError]:
        """Yield this process's share of one batch after the other, or last an error.

        An error raised in a loader's process would reach the rank as the text of its traceback.
        """
        info = get_worker_info()
        loader, loaders = (0, 1) if info is None else (info.id, info.num_workers)
        share = len(self.rank_lanes) // loaders
        with reading_threads(2) as pool:
            lanes = [self._images(lane, pool) for lane in self.rank_lanes[loader * share :][:share]]
            try:
                while True:
                    images = [one for lane in lanes for one in itertools.islice(lane, self.width)]
                    yield torch.from_numpy(np.stack(images))
            except UserError as error:
                yield error

    def _images(self, lane: int, pool: ThreadPoolExecutor) -> Iterator[np.ndarray]:
        """Yield the images of a lane, reading a shard ahead."""
        sizes = [shard.samples for shard in self.shards]
        pieces = order.lane_pieces(self.seed, sizes, lane, self.lanes, self.skip)
        ahead = pool.submit(self._read, next(pieces))
        empty = 0
        while True:
            images, ahead = ahead.result(), pool.submit(self._read, next(pieces))
            yield from images
            empty = 0 if images else empty + 1
            if empty > len(sizes):
                raise UserError(f"No sample of {self.stream.data_uri} can be read: build it again.")

    def _read(self, piece: order.Piece) -> list[np.ndarray]:
        """Return a piece's images, views of the shard's bytes; bad ones may be left out."""
        stream = self.stream
        samples = read_shard(
            stream.data_uri,
            self.shards[piece.shard],
            stream.manifest.image_shape,
            skip_bad=stream.skip_bad,
        )
        return [samples[index].image for index in piece.samples if index < len(samples)]
