"""A step as one CUDA graph: on a GPU the small networks of this method wait for the host otherwise.

The graph computes ``step.update`` on buffers of its own, so its results are those of the plain
step. It is captured after three steps that warm up libraries and are then undone.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ivegan.order import Draws
from ivegan.step import State, Update, update


def fastest_update(state: State) -> Update:
    """Return ``update``, or on a single GPU a captured one that computes the same.

    Several ranks reduce gradients in hooks of DDP, and compiled networks capture on their own.
    """
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    compiled = state.generator_side._compiled_call_impl is not None
    if state.device.type == "cuda" and alone and not compiled:
        return _CapturedUpdate()
    return update


class _CapturedUpdate:
    """Captures ``update`` at its first call and replays it at every call."""

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, state: State, x: Tensor, draws: Draws) -> dict[str, Tensor]:
        if self.graph is None:
            self._capture(state, x, draws)
        assert self.graph is not None, "captured above"
        self.x.copy_(x, non_blocking=True)
        for ours, theirs in zip(self.draws, draws, strict=True):
            ours.copy_(theirs, non_blocking=True)
        self.graph.replay()
        # The next replay overwrites the graph's outputs.
        return {name: value.clone() for name, value in self.scalars.items()}

    def _capture(self, state: State, x: Tensor, draws: Draws) -> None:
        self.x, self.draws = x.clone(), Draws(*(d.clone() for d in draws))
        # A stream of its own: cuBLAS has one workspace per stream, which two graphs that replay at
        # the same time must not share.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        before = {name: tensor.clone() for name, tensor in _tensors(state).items()}
        with torch.cuda.stream(stream):
            for _ in range(3):
                update(state, self.x, self.draws)
        torch.cuda.current_stream().wait_stream(stream)
        _undo(state, before)
        for optimizer in (state.optimizer_g, state.optimizer_d):
            optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.scalars = update(state, self.x, self.draws)
        self.graph = graph


def _tensors(state: State) -> dict[tuple[object, ...], Tensor]:
    """Return every tensor that a step changes, under a name."""
    networks = [state.generator_side, state.discriminator_side]
    networks += [] if state.average is None else [state.average]
    tensors: dict[tuple[object, ...], Tensor] = {}
    for i, network in enumerate(networks):
        tensors |= {(i, name): t for name, t in network.state_dict().items()}
    for side, optimizer in enumerate((state.optimizer_g, state.optimizer_d)):
        tensors |= {("guard", side, i): t for i, t in enumerate(optimizer.guard)}
        for p, (_, values) in enumerate(optimizer.state.items()):
            tensors |= {("adam", side, p, k): t for k, t in values.items()}
    return tensors


@torch.no_grad()
def _undo(state: State, before: dict[tuple[object, ...], Tensor]) -> None:
    """Copy a snapshot back; what the warm-up steps have made since, Adam's moments, starts at 0."""
    for name, tensor in _tensors(state).items():
        if name in before:
            tensor.copy_(before[name])
        else:
            tensor.zero_()
