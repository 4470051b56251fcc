"""An alarm is raised once, and only where training learns nothing."""

from math import log

import numpy as np
import pytest
import torch

from ivegan.config import override, preset
from ivegan.evaluation.alarms import SENTENCES, Alarms
from ivegan.step import create_state

LN2 = log(2)


@pytest.mark.parametrize(
    ("name", "losses", "alarms"),
    [
        ("mnist", {"loss/D": 0.9, "loss/D_prime": 1.0}, []),
        ("mnist", {"loss/D": 0.001, "loss/D_prime": 1.0}, ["discriminator_won"]),
        ("mnist", {"loss/D": 0.9, "loss/D_prime": 2 * LN2}, ["discriminator_at_chance"]),
        ("mnist-plus", {"loss/D": 0.53, "loss/D_prime": LN2}, ["discriminator_at_chance"]),
    ],
)
def test_losses_that_stay_raise_their_alarm_once(
    name: str, losses: dict[str, float], alarms: list[str]
) -> None:
    watched = Alarms(preset(name))
    found = [watched.of_losses(losses) for _ in range(30)]
    assert found[:9] == [[]] * 9
    assert [name for names in found for name in names] == alarms
    recovering = Alarms(preset(name))
    for step in range(30):
        assert not recovering.of_losses(
            losses if step % 8 else {"loss/D": 0.9, "loss/D_prime": 1.0}
        )


def test_collapsed_codes_and_ignored_noise_are_found() -> None:
    config = override(preset("digits-plus"), {"model.width": 0.25})
    networks = create_state(config).encoder_generator
    images = np.random.default_rng(0).integers(0, 255, (10, 1, 16, 16), dtype=np.uint8)
    assert Alarms(config).of_networks(networks, images) == []
    assert networks.training
    encoder, generator = networks.encoder, networks.generator
    networks.generator.forward = lambda noise, z: generator.__class__.forward(
        generator, torch.zeros_like(noise), z
    )
    watched = Alarms(config)
    assert watched.of_networks(networks, images) == ["noise_ignored"]
    assert watched.of_networks(networks, images) == []
    networks.encoder.forward = lambda x: encoder.__class__.forward(encoder, x) * 1e-3
    assert watched.of_networks(networks, images) == ["codes_collapsed"]
    assert all(sentence[0] in "abDEG" for sentence in SENTENCES.values())
