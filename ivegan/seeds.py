"""Several games on points, of equal settings but for the seed, played as one batched computation.

A step on points is bound by the number of its operations, not by their size. So the weights of all
games are stacked, every operation is done once for all of them, and ten seeds cost little more than
one. Each game is what it would be alone, up to rounding.
"""

import dataclasses
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ivegan import layers, order
from ivegan.config import Config
from ivegan.networks import Discriminators, EncoderGenerator, Logits
from ivegan.step import State, create_state, make_state


class Stack(nn.Module):
    """Networks of one architecture as one, every tensor with a first dimension for the game."""

    def __init__(self, networks: list[nn.Module]) -> None:
        """Copy the weights of networks without buffers, that is, without batch norm."""
        super().__init__()
        assert not any(True for n in networks for _ in n.buffers()), "batch norm cannot be stacked"
        self.one = layers.plain(deepcopy(networks[0]))  # vmap cannot look into functions of ours
        for layer in self.one.modules():
            if isinstance(layer, nn.Tanh):
                layer.__class__ = layers.Tanh
        for name, _ in networks[0].named_parameters():
            stacked = torch.stack([n.get_parameter(name).detach() for n in networks])
            module, _, leaf = name.rpartition(".")
            setattr(self.one.get_submodule(module), leaf, nn.Parameter(stacked))

    def forward(self, *tensors: Tensor, **flags: bool) -> Any:
        """Return what each network makes of its own part of the tensors."""

        def one(weights: dict[str, Tensor], *mine: Tensor) -> Any:
            out = torch.func.functional_call(self.one, weights, mine, flags)
            if isinstance(out, Logits):
                return {name: part for name, part in out._asdict().items() if part is not None}
            return out

        out = torch.func.vmap(one)(dict(self.one.named_parameters()), *tensors)
        return Logits(**{**dict.fromkeys(Logits._fields), **out}) if isinstance(out, dict) else out


def stack(config: Config, seeds: list[int], device: torch.device | str = "cpu") -> State:
    """Return the state of one game per seed, for ``train_step``, whose scalars are then (games,).

    Args:
        config: of each game, but for its seed; on points, without penalties.
        seeds: one per game.
        device: where the networks go.
    """
    assert config.is_points, "only games on points are stacked"
    assert not config.objective.r1, "penalties are not stacked"
    assert not config.objective.r2, "penalties are not stacked"
    alone = [create_state(dataclasses.replace(config, seed=seed), device) for seed in seeds]
    return make_state(config, Stack([s.players for s in alone]), Stack([s.judges for s in alone]))


def batches(
    config: Config, seeds: list[int], device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, order.Draws]]:
    """Yield the batches of all games, (games, n, 2), and their draws, step after step."""
    games = [dataclasses.replace(config, seed=seed) for seed in seeds]
    step = 0
    while True:
        x = torch.stack([order.points(game, step) for game in games])
        draws = zip(*(order.draw(game, step) for game in games), strict=True)
        yield x.to(device), order.Draws(*(torch.stack(part).to(device) for part in draws))
        step += 1


def unstack(state: State) -> list[tuple[EncoderGenerator, Discriminators]]:
    """Return the networks of each game by itself."""
    assert isinstance(state.players, Stack)
    assert isinstance(state.judges, Stack)
    model = state.config.model
    found = []
    for game in range(len(next(state.players.parameters()))):
        pair = EncoderGenerator(model), Discriminators(model)
        for network, stacked in zip(pair, (state.players, state.judges), strict=True):
            weights = stacked.one.state_dict()
            network.load_state_dict({name: value[game] for name, value in weights.items()})
        found.append(pair)
    return found
