"""The four networks and the shared trunk, built from the tables in ``layers/tables.py``.

    E(x)        encoder: image or point -> z in (-1, 1)
    G(z', z)    generator: noise and latent -> image in [0, 1], or point
    D_enc       trunk: image -> feature vector, shared by both discriminators (identity for points)
    D           pair head: (x, candidate) -> logit that the candidate is T(x)
    D'          sample head: candidate -> logit that the candidate is real

Readings of the tables where they contradict themselves: E ends in z_dim units and the trunk in the
wide layer (Table 2 has the two transposed); every discriminator ends in one linear unit; padding is
SAME but for the 2x2 convolution, which is VALID; Table 1's D' sees the point itself.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ivegan.config import Model
from ivegan.layers.build import (
    SLOPE,
    conv_body,
    deconv,
    dense,
    hidden_units,
    is_batch,
    norm1d,
    norm2d,
    wide,
)
from ivegan.layers.tables import ARCHITECTURES
from ivegan.shapes import Float


def sample_shape(model: Model) -> tuple[int, ...]:
    """Return the shape of one sample: (channels, height, width), or (2,) for points."""
    return ARCHITECTURES[model.architecture].shape


class Fourier(nn.Module):
    """Coordinates, and octaves of their sine and cosine (Tancik et al. 2020).

    An octave's amplitude is the inverse of its frequency, so that all of them have equal slopes.
    """

    def __init__(self, size: int, octaves: int) -> None:
        super().__init__()
        self.width = size * (1 + 2 * octaves)
        self.register_buffer("octaves", 2.0 ** torch.arange(octaves), persistent=False)
        self.octaves: Tensor

    def forward(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
        octaves = self.octaves.to(x.dtype)
        phases = math.pi * x[:, :, None] * octaves
        waves = torch.stack((phases.sin(), phases.cos())) / octaves
        return torch.cat((x, *waves.flatten(2)), dim=1)


class Encoder(nn.Module):
    """E: samples -> latents in (-1, 1)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        table = ARCHITECTURES[model.architecture]
        if table.convs:
            self.features = nn.Identity()
            self.body = conv_body(model, table, model.z_dim, model.norm)
        else:
            self.features = Fourier(2, model.fourier_x)
            sizes = [self.features.width, *hidden_units(model, table), model.z_dim]
            self.body = dense(sizes, table.activation)

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n z"]:
        return self.body(self.features(x)).tanh()


class Generator(nn.Module):
    """G: (z', z) -> samples; images in [0, 1], points in (-1, 1)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        table = ARCHITECTURES[model.architecture]
        self.features = Fourier(model.z_dim, model.fourier)
        inputs = model.noise_dim + self.features.width
        if not table.deconvs:
            body = dense([inputs, *hidden_units(model, table), 2], table.activation)
            self.body = nn.Sequential(body, nn.Tanh())
            return
        filters, side = wide(table.base[0], model), table.base[1]
        units = filters * side * side
        norm = norm1d(model.norm, units)
        layers: list[nn.Module] = [
            nn.Linear(inputs, units, bias=not is_batch(norm)),
            *norm,
            nn.LeakyReLU(SLOPE, inplace=True),
            nn.Unflatten(1, (filters, side, side)),
        ]
        channels = filters
        for conv in table.deconvs[:-1]:
            out = wide(conv.filters, model)
            norm = norm2d(model.norm, out, conv)
            layers += [
                *deconv(channels, out, conv, bias=not is_batch(norm)),
                *norm,
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
            channels = out
        image = table.deconvs[-1]
        layers += [*deconv(channels, image.filters, image, image=True), nn.Sigmoid()]
        self.body = nn.Sequential(*layers)

    def forward(
        self, noise: Float[Tensor, "n noise"], z: Float[Tensor, "n z"]
    ) -> Float[Tensor, "n ..."]:
        return self.body(torch.cat((noise, self.features(z)), dim=1))


class Generated(NamedTuple):
    """What E and G compute in one step."""

    x_hat: Tensor
    """G(z', E(x)), variations of x; (n, ...)"""
    x_prior: Tensor
    """G(z', z), samples from the prior; (n, ...)"""
    z: Tensor
    """The codes that x_hat is decoded from, (n, z)."""
    z_second: Tensor | None
    """The codes of a second transformation of x, if one was given."""
    z_again: Tensor | None
    """E(G(z', z)), the codes of prior samples, if asked for; no gradient reaches G through it."""


class EncoderGenerator(nn.Module):
    """E and G, which train together against the discriminators."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.encoder = Encoder(model)
        self.generator = Generator(model)

    def forward(
        self,
        x: Float[Tensor, "n ..."],
        noise: Float[Tensor, "n noise"],
        z_prior: Float[Tensor, "n z"],
        noise_prior: Float[Tensor, "n noise"],
        second: Float[Tensor, "n ..."] | None = None,
        *,
        again: bool = False,
    ) -> Generated:
        """Return variations of x, samples from the prior, and the codes of x and of ``second``.

        G runs once over variations and prior samples, so that the statistics of its batch norm are
        those of one kind of batch. For the same reason E runs once over x and ``second``.
        """
        codes = self.encoder(x if second is None else torch.cat((x, second)))
        z, z_second = (codes, None) if second is None else codes.chunk(2)
        latents = torch.cat((z, z_prior))
        x_hat, x_prior = self.generator(torch.cat((noise, noise_prior)), latents).chunk(2)
        z_again = self.encoder(x_prior.detach()) if again else None
        return Generated(x_hat, x_prior, z, z_second, z_again)


class Logits(NamedTuple):
    """The discriminators' logits of one batch, each of shape (n,); None where not requested."""

    pair_real: Tensor | None
    """D(T(x), x)"""
    pair_fake: Tensor
    """D(G(z', E(x)), x)"""
    pair_mismatched: Tensor | None
    """D(T(y), x), y another sample of the batch"""
    sample_real: Tensor | None
    """D'(x)"""
    sample_fake: Tensor
    """D'(G(z', z))"""


class Discriminators(nn.Module):
    """D and D', two heads over one trunk."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        table = ARCHITECTURES[model.architecture]
        self.batch_norm = model.trunk_norm in ("batch", "sync")
        self.difference = model.pair_features == "difference"
        if table.convs:
            width = wide(table.trunk_dim, model)
            self.trunk = nn.Sequential(
                *conv_body(model, table, width, model.trunk_norm),
                nn.LeakyReLU(SLOPE, inplace=True),
            )
        else:
            self.trunk = Fourier(table.trunk_dim, model.fourier_x)
            width = self.trunk.width
        self.width = width
        features = (4 if self.difference else 2) * width
        pair = [features, *(wide(n, model) for n in table.pair_head), 1]
        sample = [width, *(wide(n, model) for n in table.sample_head), 1]
        self.pair_head = dense(pair, table.activation)
        self.sample_head = dense(sample, table.activation)

    def forward(
        self,
        x: Float[Tensor, "n ..."],
        tx: Float[Tensor, "n ..."],
        x_hat: Float[Tensor, "n ..."],
        x_prior: Float[Tensor, "n ..."],
        *,
        real: bool = True,
        mismatched: bool = False,
    ) -> Logits:
        """Return the logits of one step, those of real samples and mismatched pairs on request.

        The trunk runs once over real and once over generated samples: batch norm statistics then
        never mix the two, and D and D' share the features of x. Each head runs once.
        """
        if real or mismatched or self.batch_norm:  # whose statistics are those of x and T(x)
            x_features, tx_features = self.trunk(torch.cat((x, tx))).chunk(2)
        else:
            x_features = tx_features = self.trunk(x)
        x_hat_features, x_prior_features = self.trunk(torch.cat((x_hat, x_prior))).chunk(2)
        candidates = [x_hat_features, *([tx_features] if real else [])]
        if mismatched:
            # Neighbours 2k and 2k+1 swap places: the same partner for any number of workers.
            candidates.append(tx_features.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
        pairs = self.pair(torch.cat(candidates), x_features.repeat(len(candidates), 1))
        pair_fake, *others = pairs.chunk(len(candidates))
        singles = [x_prior_features, *([x_features] if real else [])]
        sample_fake, *sample_real = self.sample(torch.cat(singles)).chunk(len(singles))
        return Logits(
            pair_real=others[0] if real else None,
            pair_fake=pair_fake,
            pair_mismatched=others[-1] if mismatched else None,
            sample_real=sample_real[0] if real else None,
            sample_fake=sample_fake,
        )

    def pair(
        self, candidate: Float[Tensor, "n f"], condition: Float[Tensor, "n f"]
    ) -> Float[Tensor, " n"]:
        """Return D's logits that each candidate is a transformation of its condition."""
        features = [condition, candidate]
        if self.difference:
            features += [condition - candidate, condition * candidate]
        return self.pair_head(torch.cat(features, dim=1)).squeeze(1)

    def sample(self, candidate: Float[Tensor, "n f"]) -> Float[Tensor, " n"]:
        """Return the logits of D' that each candidate is real."""
        return self.sample_head(candidate).squeeze(1)


@contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Neither use nor learn the statistics of batches in the block; modes come back after it."""
    modes_before = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, was_training in modes_before:
            module.training = was_training
