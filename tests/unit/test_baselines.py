"""Baselines: losses against naive computations, and that each learns what it claims to."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from ivegan import order
from ivegan.baselines.adversarial import GAN, BiGAN, Critic
from ivegan.baselines.autoencoder import (
    Autoencoder,
    VariationalAutoencoder,
    kl_from_prior,
)
from ivegan.baselines.siamese import Siamese, nt_xent, vicreg
from ivegan.baselines.training import Baseline, train
from ivegan.baselines.untrained import pca, random_encoder
from ivegan.config import Config, override, preset
from ivegan.data.batches import batches
from ivegan.data.cache import Split
from ivegan.step import NonFiniteLossError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (40, 1, 16, 16), dtype=np.uint8)


def config_of(name: str, **changes: object) -> Config:
    small = {"model.width": 0.25, "batch_size": 8, "total_images": 16, "optim.ema": 0.0}
    return override(preset(name), small | {k.replace("__", "."): changes[k] for k in changes})


def batches_of(config: Config, images: np.ndarray = IMAGES) -> Iterator[tuple[Tensor, order.Draws]]:
    labels = np.zeros(len(images), np.int64)
    split = Split(images=images, labels=labels, keys=[], dataset_hash="")
    source = None if config.is_points else split
    return batches(config, source, 0, 0, 1, torch.device("cpu"))


def test_nt_xent_equals_the_sum_over_pairs() -> None:
    first, second = torch.from_numpy(RNG.normal(size=(2, 5, 3)))
    views = [v / v.norm() for v in (*first, *second)]
    losses = []
    for i, view in enumerate(views):
        partner = views[(i + 5) % 10]
        others = [torch.exp(view @ other / 0.1) for k, other in enumerate(views) if k != i]
        losses.append(-torch.log(torch.exp(view @ partner / 0.1) / sum(others)))
    torch.testing.assert_close(nt_xent(first, second, 0.1), torch.stack(losses).mean())


def test_vicreg_equals_its_equations() -> None:
    first, second = RNG.normal(size=(2, 6, 4)) * 0.5
    expected = 25 * np.mean((first - second) ** 2)
    for view in (first, second):
        covariance = np.cov(view.T)
        spread = np.sqrt(np.diag(covariance) + 1e-4)
        expected += 25 / 2 * np.mean(np.maximum(0, 1 - spread))
        pairs = itertools.permutations(range(4), 2)
        expected += sum(covariance[i, j] ** 2 for i, j in pairs) / 4
    found = vicreg(torch.from_numpy(first), torch.from_numpy(second))
    torch.testing.assert_close(found.item(), expected)


NORMAL = torch.distributions.Normal(0.0, 1.0)


def test_the_kl_divergence_equals_that_of_torch() -> None:
    mean, log_variance = torch.from_numpy(RNG.normal(size=(2, 5, 3)))
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    each = torch.distributions.kl_divergence(posterior, NORMAL)
    torch.testing.assert_close(kl_from_prior(mean, log_variance), each.sum(1))


def test_a_vae_takes_the_uniform_prior_for_its_normal_one() -> None:
    vae = VariationalAutoencoder(config_of("digits-plus", model__z_dim=2)).eval()
    mean, _ = vae.encoder.moments(x := torch.rand(3, 1, 16, 16))
    torch.testing.assert_close(vae.encoder(x), 2 * NORMAL.cdf(mean) - 1)
    z, noise, decoder = torch.tensor([[-0.5, 0.9]]), torch.randn(1, 4), vae.generator
    expected = decoder.decoder(torch.zeros(1, 4), NORMAL.icdf((z + 1) / 2))
    torch.testing.assert_close(decoder(noise, z), expected)
    assert decoder(noise, torch.ones(1, 2)).isfinite().all()


def test_a_packed_critic_sees_neighbours_together() -> None:
    critic, x = Critic(config_of("ring-plus"), (16,), packed=2), torch.randn(6, 2)
    moved = x.clone()
    moved[3] += 1
    assert torch.isclose(critic(moved), critic(x)).tolist() == [True, False, True]


def test_penalties_fall_with_the_run_and_are_means_over_packs() -> None:
    config = config_of("ring-plus", objective__r2=0.0)
    gan = GAN(config, packed=2)
    x, draws = next(batches_of(config))
    losses = []
    for gan.annealing in (0.0, 0.25, 1.0):
        losses.append(gan.critic_loss(x, draws).item())
    moved = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gan.critic(moved).sum(), moved)
    expected = 0.5 * gradient.unflatten(0, (-1, 2)).square().sum((1, 2)).mean()
    penalties = [loss - losses[0] for loss in losses]
    r1 = config.objective.r1 * expected.item()
    assert penalties == pytest.approx([0, r1 / 4, r1], rel=1e-3, abs=1e-7)


def test_a_blind_critic_costs_two_logarithms_of_two() -> None:
    config = config_of("digits")
    gan = GAN(config)
    for parameter in gan.critic.head[-1].parameters():
        torch.nn.init.zeros_(parameter)
    x, draws = next(batches_of(config))
    torch.testing.assert_close(gan.critic_loss(x, draws).item(), 2 * math.log(2))
    torch.testing.assert_close(gan.generator_loss(x, draws).item(), math.log(2))
    assert all(p.grad is None for p in gan.generator.parameters())


@pytest.mark.parametrize("loss", ["nonsaturating", "relativistic"])
def test_a_bigan_trains_its_encoder_against_the_critic(loss: str) -> None:
    config = config_of("ring", objective__loss=loss)
    bigan = BiGAN(config)
    x, draws = next(batches_of(config))
    bigan.generator_loss(x, draws).backward()
    assert all(p.grad is not None and p.grad.any() for p in bigan.encoder.parameters())


METHODS = [
    (GAN, "ring-plus"),
    (BiGAN, "digits-plus"),
    (VariationalAutoencoder, "digits-plus"),
    (functools.partial(Siamese, compare=nt_xent), "digits-plus"),
    (functools.partial(Siamese, compare=vicreg), "digits-plus"),
]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_training_is_a_function_of_the_configuration(
    kind: Callable[[Config], Baseline], name: str
) -> None:
    config = config_of(name, optim__ema=0.9)

    def trained() -> Baseline:
        return train(kind(config), batches_of(config), config)

    once, again, fresh = trained(), trained(), kind(config)
    assert not once.training
    moved = [
        not torch.equal(a, b) for a, b in zip(once.parameters(), fresh.parameters(), strict=True)
    ]
    assert any(moved)
    for a, b in zip(once.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_an_autoencoder_learns_to_reconstruct_in_few_steps() -> None:
    config = config_of("digits-plus", model__width=0.5, total_images=1600, optim__lr_g=3e-3)
    x = torch.from_numpy(IMAGES[:4]).float() / 255

    def error(model: Baseline) -> float:
        encoder, generator = model.trained
        assert encoder is not None
        assert generator is not None
        with torch.no_grad():
            return (generator(torch.zeros(4, 4), encoder(x)) - x).square().mean().item()

    before = error(Autoencoder(config).eval())
    inputs = batches_of(config, np.repeat(IMAGES[:4], 4, axis=0))
    assert error(train(Autoencoder(config), inputs, config)) < 0.5 * before


def test_training_that_diverges_is_an_error() -> None:
    config = config_of("ring-plus")
    bad = (torch.full((8, 2), torch.nan), order.draw(config, 0))
    with pytest.raises(NonFiniteLossError, match="step 1"):
        train(GAN(config), itertools.repeat(bad), config)


def test_pca_keeps_most_of_the_variance_and_the_random_encoder_its_range() -> None:
    config = config_of("digits-plus", model__z_dim=3)
    images = IMAGES.copy()
    images[:, :, :, 8:] //= 8
    encoder, generator = pca(config, images).trained
    assert encoder is not None
    assert generator is None
    pixels = images.reshape(40, -1) / 255
    values = np.linalg.eigvalsh(np.cov(pixels.T))[::-1]
    codes = encoder(torch.from_numpy(images).float() / 255)
    torch.testing.assert_close(
        codes.var(0).numpy(), values[:3].astype(np.float32), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(codes.mean(0), torch.zeros(3), rtol=0, atol=1e-4)
    codes = random_encoder(config).encoder(torch.rand(5, 1, 16, 16))
    assert codes.shape == (5, 3)
    assert codes.abs().max() < 1
