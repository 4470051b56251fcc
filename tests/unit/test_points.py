"""Gradients written out by hand are autograd's."""

import itertools

import pytest
import torch

from ivegan import order, points
from ivegan.config import override, preset
from ivegan.data.batches import batches
from ivegan.step import State, create_state, train_step


def twenty_steps(config, monkeypatch, by_hand: bool) -> tuple[State, dict[str, torch.Tensor]]:
    """Return the state after twenty steps in float64, and the last one's scalars."""
    state = create_state(config)
    state.players.double()
    state.judges.double()
    scalars = {}
    with monkeypatch.context() as patch:
        if not by_hand:
            patch.setattr(points, "possible", lambda state: False)
        assert points.possible(state) == by_hand
        for x, draws in itertools.islice(batches(config, None, 0, 0, 1, state.device), 20):
            scalars = train_step(state, x.double(), order.Draws(*(d.double() for d in draws)))
    return state, scalars


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective.loss": "minimax"},
        {"objective.mismatched": 0.7},
        {"objective.prior_weight": 0.3},
        {"dataset": "grid", "model.z_dim": 3, "model.width": 0.5},
    ],
)
def test_a_step_by_hand_is_the_step_of_autograd(changes, amd, monkeypatch):
    monkeypatch.setattr(points, "_is_amd", lambda: amd)
    config = override(preset("ring"), {"batch_size": 16, **changes})
    ours, said = twenty_steps(config, monkeypatch, True)
    theirs, expected = twenty_steps(config, monkeypatch, False)
    assert list(said) == list(expected)
    for name, value in said.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10, msg=name)
    for network in ("encoder_generator", "discriminators"):
        pairs = zip(
            getattr(ours, network).named_parameters(),
            getattr(theirs, network).parameters(),
            strict=True,
        )
        for (name, a), b in pairs:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10, msg=name)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8, msg=name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("digits", {}),
        ("ring", {"objective.loss": "relativistic"}),
        ("ring", {"objective.r1": 0.1}),
        ("ring", {"objective.r2": 0.1}),
    ],
)
def test_what_has_no_gradient_by_hand_is_left_to_autograd(name, changes):
    state = create_state(override(preset(name), {"batch_size": 16, **changes}))
    assert not points.possible(state)


def test_tanh_is_torchs_own_on_any_cpu(monkeypatch):
    monkeypatch.setattr(points, "_is_amd", lambda: True)
    x = torch.linspace(-20, 20, 100_001)
    assert (points._tanh_(x.clone()).double() - x.double().tanh()).abs().max() < 2e-7
