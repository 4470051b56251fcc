"""Autoencoders: G decodes E(x), and the pixels of x are the target. z' is not used."""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy

from ivegan import order
from ivegan.baselines.training import Baseline
from ivegan.config import Config
from ivegan.layers.build import initialise
from ivegan.networks import Encoder, Generator
from ivegan.shapes import Float
from ivegan.transforms import transform


class Decoder(nn.Module):
    """A generator whose noise is always zero."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.decoder = Generator(config.model)
        initialise(self.decoder, order.weights_seed(config.seed, 1))

    def forward(
        self, noise: Float[Tensor, "n noise"], z: Float[Tensor, "n z"]
    ) -> Float[Tensor, "n ..."]:
        return self.decoder(torch.zeros_like(noise), z)


class Autoencoder(Baseline):
    """Reconstruct x from E(x), or, if ``denoising``, from E(T(x)) (Vincent et al. 2008)."""

    def __init__(self, config: Config, *, denoising: bool = False) -> None:
        super().__init__()
        self.config, self.denoising = config, denoising
        self.encoder = Encoder(config.model)
        self.generator = Decoder(config)
        initialise(self.encoder, order.weights_seed(config.seed, 0))

    def loss(self, x: Tensor, draws: order.Draws) -> Tensor:
        """Return the cross-entropy of pixels, in nats an image."""
        seen = transform(x, draws.transform, self.config.transform) if self.denoising else x
        return cross_entropy(self.generator(draws.noise, self.encoder(seen)), x)


class VariationalEncoder(nn.Module):
    """Mean of q(z | x), on the scale where the prior is uniform on (-1, 1).

    The normal distribution function maps a standard normal z there, so the codes and the prior have
    the range of all other encoders.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        wider = dataclasses.replace(config.model, z_dim=2 * config.model.z_dim)
        self.body = Encoder(wider).body
        initialise(self.body, order.weights_seed(config.seed, 0))

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n z"]:
        mean, _ = self.moments(x)
        return torch.erf(mean / math.sqrt(2))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithm of the variance of q(z | x)."""
        mean, log_variance = self.body(x).chunk(2, dim=1)
        return mean, log_variance


class VariationalDecoder(Decoder):
    """Decodes z of that scale."""

    def forward(
        self, noise: Float[Tensor, "n noise"], z: Float[Tensor, "n z"]
    ) -> Float[Tensor, "n ..."]:
        normal = math.sqrt(2) * torch.erfinv(z.clamp(-1 + 1e-6, 1 - 1e-6))
        return super().forward(noise, normal)


class VariationalAutoencoder(Baseline):
    """Kingma and Welling 2014, with independent Bernoulli pixels."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = VariationalEncoder(config)
        self.generator = VariationalDecoder(config)

    def loss(self, x: Tensor, draws: order.Draws) -> Tensor:
        """Return the negative evidence lower bound, in nats an image."""
        mean, log_variance = self.encoder.moments(x)
        normal = math.sqrt(2) * torch.erfinv(draws.z_prior.clamp(-1 + 1e-6, 1 - 1e-6))
        z = mean + normal * (log_variance / 2).exp()
        # Not through the uniform scale, whose ends have no gradient.
        decoded = self.generator.decoder(torch.zeros_like(draws.noise), z)
        return cross_entropy(decoded, x) + kl_from_prior(mean, log_variance).mean()


def kl_from_prior(
    mean: Float[Tensor, "n z"], log_variance: Float[Tensor, "n z"]
) -> Float[Tensor, " n"]:
    """Return the KL divergence of a diagonal Gaussian from the standard normal one."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


def cross_entropy(decoded: Float[Tensor, "n ..."], x: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Return the cross-entropy of pixels in [0, 1], summed over an image, mean over images."""
    return binary_cross_entropy(decoded, x, reduction="sum") / len(x)
