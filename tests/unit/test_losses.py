"""The objective's terms against closed forms and an independent reference."""

import pytest
import torch

from ivegan.losses import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    invariance_loss,
)

LOSSES = ["nonsaturating", "minimax", "relativistic"]


def test_the_generator_minimises_what_equation_3_says():
    real, fake = torch.randn(2, 64, dtype=torch.float64)
    probability = torch.sigmoid(fake)
    torch.testing.assert_close(
        generator_loss(None, fake, "minimax"), (1 - probability).log().mean()
    )
    torch.testing.assert_close(
        generator_loss(real, fake, "relativistic"), -torch.sigmoid(fake - real).log().mean()
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_gradients_are_finite_at_extreme_logits(loss):
    real = torch.tensor([1e4, -1e4], requires_grad=True)
    fake = torch.tensor([-1e4, 1e4], requires_grad=True)
    total = discriminator_loss(real, fake, loss) + generator_loss(real, fake, loss)
    total.backward()
    assert total.isfinite()
    assert real.grad is not None
    assert real.grad.isfinite().all()
    assert fake.grad is not None
    assert fake.grad.isfinite().all()


def test_gradient_penalty_of_a_linear_function_is_half_its_squared_slope():
    slope = torch.tensor([3.0, 4.0])
    a, b = (torch.randn(6, 2, requires_grad=True) for _ in range(2))
    penalty = gradient_penalty(a @ slope + 2 * (b @ slope), (a, b))
    torch.testing.assert_close(penalty, torch.tensor(0.5 * (25 + 100.0)))


def test_logits_of_different_shape_are_refused():
    with pytest.raises(TypeError):
        discriminator_loss(torch.zeros(3), torch.zeros(4), "minimax")


def test_the_invariance_loss_is_the_cross_entropy_of_finding_the_partner():
    z = torch.rand(5, 3, dtype=torch.float64) * 2 - 1
    others = torch.rand(10, 3, dtype=torch.float64) * 2 - 1
    weight = torch.exp(-torch.cdist(z, others).square() / 0.5)
    share = weight[torch.arange(5), torch.arange(5) + 4] / weight.sum(1)
    torch.testing.assert_close(invariance_loss(z, others, first=4), -share.log().mean())
    corners = torch.tensor([[-0.99] * 16, [0.99] * 16])
    assert invariance_loss(corners, corners) < 1e-6  # distinct, as far as codes can be
