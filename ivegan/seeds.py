"""Several games on points, of equal settings but for the seed, played as one batched computation.

A step on points is bound by the number of its operations, not by their size. So the weights of all
games are stacked, every operation of ``points.py`` is done once for all of them, and ten seeds cost
little more than one. Each game is what it would be alone, up to rounding.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

from ivegan import order, points
from ivegan.config import Config
from ivegan.networks import Discriminators, EncoderGenerator
from ivegan.step import State, create_state, make_state

Network = TypeVar("Network", bound=nn.Module)


def _stacked(networks: Sequence[Network]) -> Network:
    """Return networks as one whose weights have a first dimension for the game."""
    one = deepcopy(networks[0])
    for name, _ in networks[0].named_parameters():
        weights = torch.stack([n.get_parameter(name).detach() for n in networks])
        module, _, leaf = name.rpartition(".")
        setattr(one.get_submodule(module), leaf, nn.Parameter(weights))
    return one


def stack(config: Config, seeds: list[int], device: torch.device | str = "cpu") -> State:
    """Return the state of one game per seed, for ``train_step``, whose scalars are then (games,).

    Args:
        config: of each game, but for its seed; such that ``points.possible``.
        seeds: one per game.
        device: where the networks go.
    """
    alone = [create_state(dataclasses.replace(config, seed=seed), device) for seed in seeds]
    players, judges = ([getattr(s, name) for s in alone] for name in ("players", "judges"))
    state = make_state(config, _stacked(players), _stacked(judges))
    assert points.possible(state), "these settings are not played at once"
    return state


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
    model = state.config.model
    found = []
    for game in range(len(next(state.players.parameters()))):
        pair = EncoderGenerator(model), Discriminators(model)
        for network, stacked in zip(pair, (state.players, state.judges), strict=True):
            weights = stacked.state_dict()
            network.load_state_dict({name: value[game] for name, value in weights.items()})
        found.append(pair)
    return found
