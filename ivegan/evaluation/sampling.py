"""E and G of a checkpoint, applied to arrays of any length, and the random streams of measures."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from ivegan import order
from ivegan.config import Config
from ivegan.errors import UserError
from ivegan.transforms import to_float, to_uint8, transform

NUM_DRAWS = 4
"""Draws of z' for each held-out sample."""

PIXEL_SIDE = 32
"""Of the images that the raw-pixel baselines take."""
_BATCH = 500  # samples of a forward pass

# The purposes of random streams: no two share one.
PRIOR, VARIATIONS, TRANSFORM, DATA, PICTURES, FITTED, REGISTRATION, FLOOR = range(8)


@dataclass(frozen=True)
class Sampler:
    """E and G of a checkpoint on a device."""

    config: Config
    encoder: nn.Module | None
    generator: nn.Module | None
    """A baseline may lack one of them."""
    device: torch.device
    varies: bool = True
    """Whether G(z', E(x)) is trained to be distributed as T(x); of most baselines it is x."""

    @torch.no_grad()
    def encode(self, samples: np.ndarray) -> np.ndarray:
        """Return E(x) of stored images (n, c, h, w) or points (n, 2), float32."""
        assert self.encoder is not None, "codes come from an encoder"
        parts = []
        for batch in batches(samples):
            x = torch.from_numpy(np.array(batch)).to(self.device)
            parts.append(self.encoder(x if self.config.is_points else to_float(x)).cpu().numpy())
        codes = np.concatenate(parts)
        if not np.isfinite(codes).all():
            raise UserError("Some codes are not finite: the encoder of this checkpoint diverged.")
        return codes

    def generate(self, noise: Tensor, z: Tensor) -> np.ndarray:
        """Return G(z', z) as stored images, uint8, or as points."""
        return np.concatenate(list(self.generate_batches(noise, z)))

    def generate_batches(self, noise: Tensor, z: Tensor) -> Iterator[np.ndarray]:
        """Yield G(z', z) batch by batch, for more images than fit in memory."""
        assert self.generator is not None, "samples come from a generator"
        for own_noise, own_z in zip(noise.split(_BATCH), z.split(_BATCH), strict=True):
            with torch.no_grad():  # not around the yield, where the caller would inherit it
                samples = self.generator(own_noise.to(self.device), own_z.to(self.device))
            if not torch.isfinite(samples).all():
                raise UserError(
                    "The generator of this checkpoint diverged: its output is not finite."
                )
            yield (samples if self.config.is_points else to_uint8(samples)).cpu().numpy()

    def noise(self, count: int, draws: torch.Generator) -> Tensor:
        """Return draws of z', (count, noise_dim)."""
        return torch.randn(count, self.config.model.noise_dim, generator=draws)

    def prior(self, count: int, draws: torch.Generator) -> Tensor:
        """Return draws of z from the printed prior, (count, z_dim)."""
        return order.prior(count, self.config.model.z_dim, draws)

    def prior_samples(self, count: int, seed: int) -> np.ndarray:
        """Return G(z', z) with z from the printed prior."""
        draws = stream(seed, PRIOR)
        z = self.prior(count, draws)
        return self.generate(self.noise(count, draws), z)

    def transformed(self, images: np.ndarray, draws: torch.Generator) -> np.ndarray:
        """Return T(x) of stored images, as stored images."""
        x = to_float(torch.from_numpy(np.array(images)))
        uniforms = torch.rand(len(x), order.NUM_TRANSFORM_DRAWS, generator=draws)
        return to_uint8(transform(x, uniforms, self.config.transform)).numpy()


def stream(seed: int, purpose: int) -> torch.Generator:
    """Return the random stream of one purpose."""
    state = np.random.SeedSequence((seed, purpose)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def batches(samples: np.ndarray) -> Iterator[np.ndarray]:
    """Yield samples batch by batch."""
    for start in range(0, len(samples), _BATCH):
        yield samples[start : start + _BATCH]


def pixels(images: np.ndarray) -> np.ndarray:
    """Return images as rows of floats, averaged down where they are large."""
    rows = []
    for batch in batches(images):
        small = to_float(torch.from_numpy(np.array(batch)))
        if small.shape[-1] > PIXEL_SIDE:
            small = adaptive_avg_pool2d(small, PIXEL_SIDE)
        rows.append(small.flatten(1).numpy())
    return np.concatenate(rows)


def evenly(total: int, count: int) -> np.ndarray:
    """Return so many indices, evenly spread."""
    return np.linspace(0, total - 1, count).round().astype(int)
