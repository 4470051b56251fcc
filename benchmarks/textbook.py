"""The loop as a textbook would write it from the paper: the reference of the train step's rate.

Float32 and nothing clever: T per sample with PIL in a DataLoader (for points: batched), one forward
per use, the discriminators' gradients discarded in E's and G's phase. Networks, objective, batch
and optimizers are those of the preset.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ivegan import order
from ivegan.config import PROTOCOLS, Config, Transform
from ivegan.layers.fast import plain
from ivegan.networks import Discriminators, EncoderGenerator


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """x and T(x), one sample at a time."""

    def __init__(self, images: np.ndarray, t: Transform) -> None:
        self.images, self.t = images, t

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        pixels = self.images[place]
        image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        x = vary(image, self.t) if self.t.condition else image
        return tensor(x), tensor(vary(image, self.t))


def vary(image: Image.Image, t: Transform) -> Image.Image:
    """Return a transformation of an image."""
    shift = tuple(round(random.uniform(-t.shift, t.shift)) for _ in range(2))
    angle = random.uniform(-t.rotate, t.rotate)
    out = image.rotate(angle, Image.Resampling.BILINEAR, translate=shift)  # pyright: ignore[reportArgumentType]
    if t.flip and random.random() < 0.5:
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if t.brightness:
        out = ImageEnhance.Brightness(out).enhance(1 + random.uniform(-1, 1) * t.brightness)
    if t.contrast:
        out = ImageEnhance.Contrast(out).enhance(1 + random.uniform(-1, 1) * t.contrast)
    if t.hue:
        hue, *rest = out.convert("HSV").split()
        turn = round(random.uniform(-1, 1) * t.hue * 255)
        turned = Image.fromarray((np.asarray(hue, np.int16) + turn).astype(np.uint8))
        out = Image.merge("HSV", (turned, *rest)).convert("RGB")
    return out


def tensor(image: Image.Image) -> Tensor:
    """Return an image as floats in [0, 1], channels first."""
    pixels = np.asarray(image, np.float32) / 255
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def batches(config: Config, samples: np.ndarray, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x and T(x) indefinitely."""
    if config.is_points:
        points = torch.from_numpy(samples)
        _, std = order.modes(config.dataset, PROTOCOLS[config.protocol])
        while True:
            x = points[torch.randint(len(points), (config.batch_size,))]
            yield x, x + config.transform.noise_std * std * torch.randn_like(x)
    data = Pairs(samples, config.transform)
    sampler = RandomSampler(data, num_samples=10**9)
    yield from DataLoader(data, config.batch_size, sampler=sampler, num_workers=workers)


def steps(config: Config, samples: np.ndarray, device: str, workers: int) -> Iterator[int]:
    """Train, yielding after every step."""
    m, o, objective = config.model, config.optim, config.objective
    generators, D = plain(EncoderGenerator(m)).to(device), plain(Discriminators(m)).to(device)
    for layer in (*generators.modules(), *D.modules()):
        if isinstance(layer, nn.LeakyReLU):
            layer.inplace = False
    E, G = generators.encoder, generators.generator
    adam_g = torch.optim.Adam(generators.parameters(), o.lr_g, (o.beta1, o.beta2), foreach=False)
    adam_d = torch.optim.Adam(D.parameters(), o.lr_d, (o.beta1, o.beta2), foreach=False)

    def pair(candidate: Tensor, x: Tensor) -> Tensor:
        return D.pair(D.trunk(candidate), D.trunk(x))

    def sample(candidate: Tensor) -> Tensor:
        return D.sample(D.trunk(candidate))

    def noise(n: int) -> Tensor:
        return torch.randn(n, m.noise_dim, device=device)

    for step, (x_host, tx_host) in enumerate(batches(config, samples, workers)):
        x, tx = x_host.to(device), tx_host.to(device)
        n = len(x)
        z = 2 * torch.rand(n, m.z_dim, device=device) - 1
        adam_d.zero_grad()
        x_hat, x_prior = G(noise(n), E(x)).detach(), G(noise(n), z).detach()
        loss = softplus(-pair(tx, x)).mean() + softplus(pair(x_hat, x)).mean()
        loss = loss + softplus(-sample(x)).mean() + softplus(sample(x_prior)).mean()
        if objective.mismatched:
            loss = loss + objective.mismatched * (
                softplus(-pair(tx, x)).mean() + softplus(pair(tx.roll(1, 0), x)).mean()
            )
        loss.backward()
        adam_d.step()
        adam_g.zero_grad()
        x_hat, x_prior = G(noise(n), E(x)), G(noise(n), z)
        loss_g = softplus(-pair(x_hat, x)).mean() + softplus(-sample(x_prior)).mean()
        loss_g.backward()
        adam_g.step()
        loss_g.item()  # printed or logged, as such loops do
        yield step
