"""Several games at once are what each is alone."""

import dataclasses

import pytest
import torch

from ivegan import seeds
from ivegan.config import override, preset
from ivegan.data.batches import batches
from ivegan.step import create_state, train_step

SEEDS = [3, 0, 8]


@pytest.mark.parametrize("name", ["ring", "ring-plus"])
def test_games_at_once_are_the_games_alone(name):
    config = override(preset(name), {"batch_size": 16})
    together = seeds.stack(config, SEEDS)
    games = [create_state(dataclasses.replace(config, seed=seed)) for seed in SEEDS]
    ours = seeds.batches(config, SEEDS)
    theirs = [batches(game.config, None, 0, 0, 1, game.device) for game in games]
    for _ in range(19):
        train_step(together, *next(ours))
        for game, own in zip(games, theirs, strict=True):
            train_step(game, *next(own))
    scalars = train_step(together, *next(ours))
    alone = [train_step(game, *next(own)) for game, own in zip(games, theirs, strict=True)]
    for key, values in scalars.items():
        expected = torch.stack([one[key] for one in alone])
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5, msg=key)
    for game, (players, judges) in zip(games, seeds.unstack(together), strict=True):
        for network, own in ((players, game.players), (judges, game.judges)):
            torch.testing.assert_close(
                network.state_dict(), dict(own.state_dict()), rtol=1e-3, atol=1e-5
            )
    weights = [next(players.parameters()) for players, _ in seeds.unstack(together)]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("changes", [{"objective.r1": 0.1}, {"objective.loss": "relativistic"}])
def test_what_cannot_be_played_at_once_is_told(changes):
    with pytest.raises(AssertionError, match="not played at once"):
        seeds.stack(override(preset("ring"), changes), SEEDS)
