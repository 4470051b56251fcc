"""The four networks and the shared trunk: Tables 1-3 of the paper, as readable as the tables.

    E(x)        encoder: image or point -> z in (-1, 1)
    G(z', z)    generator: noise and latent -> image in [0, 1], or point
    D_enc       trunk: image -> feature vector, shared by both discriminators (identity for points)
    D           pair head: (x, candidate) -> logit that the candidate is T(x)
    D'          sample head: candidate -> logit that the candidate is real

Readings of the tables where they contradict themselves: E ends in z_dim units and the trunk in the
wide layer (Table 2 has the two transposed); every discriminator ends in one linear unit; padding is
SAME but for the 2x2 convolution, which is VALID; Table 1's D' sees the point itself.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ivegan import layers as fast
from ivegan.config import Model
from ivegan.shapes import Float

SLOPE = 0.2  # of every LeakyReLU, Tables 2 and 3


class Conv(NamedTuple):
    """One row of a table: kernel and stride are square, filters are counted at width 1."""

    kernel: int
    stride: int
    filters: int
    norm: bool = True


@dataclass(frozen=True)
class Architecture:
    """The layer table of one experiment."""

    shape: tuple[int, ...]
    """Shape of one sample: (channels, height, width), or (2,) for points."""
    convs: tuple[Conv, ...]
    """Convolutions of E and of D_enc; empty for points."""
    trunk_dim: int
    """Units in the last layer of D_enc."""
    base: tuple[int, int]
    """(filters, side) of the feature map that G's dense layer is reshaped to."""
    deconvs: tuple[Conv, ...]
    """Transposed convolutions of G; the last one makes the image."""
    pair_head: tuple[int, ...]
    """Hidden units of D's head."""
    sample_head: tuple[int, ...]
    """Hidden units of D's head for single samples, D'."""


ARCHITECTURES: dict[str, Architecture] = {
    "points": Architecture(
        shape=(2,),
        convs=(),
        trunk_dim=2,
        base=(128, 1),
        deconvs=(),
        pair_head=(128,),
        sample_head=(128,),
    ),
    # Ours: small enough to learn in minutes on two cores.
    "digits": Architecture(
        shape=(1, 16, 16),
        convs=(Conv(3, 2, 32, norm=False), Conv(3, 2, 64), Conv(3, 2, 128)),
        trunk_dim=128,
        base=(128, 4),
        deconvs=(Conv(3, 2, 64), Conv(3, 2, 32, norm=False), Conv(3, 1, 1, norm=False)),
        pair_head=(128,),
        sample_head=(64,),
    ),
    "mnist": Architecture(
        shape=(1, 32, 32),
        convs=(Conv(5, 2, 64), Conv(3, 2, 128), Conv(3, 2, 256), Conv(3, 2, 256), Conv(2, 1, 256)),
        trunk_dim=1024,
        base=(256, 4),
        deconvs=(
            Conv(3, 2, 256),
            Conv(3, 2, 128),
            Conv(5, 2, 64, norm=False),
            Conv(5, 1, 1, norm=False),
        ),
        pair_head=(128, 64, 16),
        sample_head=(64,),
    ),
    "celeba": Architecture(
        shape=(3, 128, 128),
        convs=(
            Conv(5, 2, 128),
            Conv(5, 2, 128),
            Conv(5, 2, 256),
            Conv(3, 2, 256),
            Conv(3, 2, 512),
            Conv(3, 2, 512),
            Conv(2, 1, 1024),
        ),
        trunk_dim=1024,
        base=(1024, 2),
        deconvs=(
            Conv(2, 2, 512),
            Conv(2, 1, 512),
            Conv(3, 2, 256),
            Conv(3, 1, 256),
            Conv(3, 2, 256),
            Conv(3, 1, 256),
            Conv(5, 2, 128),
            Conv(5, 1, 128),
            Conv(5, 2, 128),
            Conv(5, 1, 128, norm=False),
            Conv(5, 2, 64, norm=False),
            Conv(5, 1, 3, norm=False),
        ),
        pair_head=(1024, 512, 128),
        sample_head=(128,),
    ),
}


def sample_shape(model: Model) -> tuple[int, ...]:
    """Return the shape of one sample: (channels, height, width), or (2,) for points."""
    return ARCHITECTURES[model.architecture].shape


class Encoder(nn.Module):
    """E: samples -> latents in (-1, 1)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        table = ARCHITECTURES[model.architecture]
        if table.convs:
            self.body = _conv_body(model, table, last=model.z_dim)
        else:
            self.body = _tanh_mlp([2, _wide(128, model), model.z_dim])

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n z"]:
        return self.body(x).tanh()


class Generator(nn.Module):
    """G: (z', z) -> samples; images in [0, 1], points in (-1, 1)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        table = ARCHITECTURES[model.architecture]
        inputs = model.noise_dim + model.z_dim
        filters, side = _wide(table.base[0], model), table.base[1]
        if not table.deconvs:
            self.body = nn.Sequential(_tanh_mlp([inputs, filters, 2]), nn.Tanh())
            return
        units = filters * side * side
        norm = _norm1d(model, units)
        layers: list[nn.Module] = [
            nn.Linear(inputs, units, bias=not _is_batch(norm)),
            *norm,
            nn.LeakyReLU(SLOPE, inplace=True),
            nn.Unflatten(1, (filters, side, side)),
        ]
        channels = filters
        for conv in table.deconvs[:-1]:
            out = _wide(conv.filters, model)
            norm = _norm2d(model, out, conv)
            layers += [
                *_deconv(channels, out, conv, bias=not _is_batch(norm)),
                *norm,
                nn.LeakyReLU(SLOPE, inplace=True),
            ]
            channels = out
        image = table.deconvs[-1]
        layers += [*_deconv(channels, image.filters, image, image=True), nn.Sigmoid()]
        self.body = nn.Sequential(*layers)

    def forward(
        self, noise: Float[Tensor, "n noise"], z: Float[Tensor, "n z"]
    ) -> Float[Tensor, "n ..."]:
        return self.body(torch.cat((noise, z), dim=1))


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
    ) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."]]:
        """Return variations of x, G(z', E(x)), and samples from the prior, G(z', z).

        G runs once over both, so that batch norm knows one kind of generated batch, the one it
        will meet in evaluation.
        """
        z = torch.cat((self.encoder(x), z_prior))
        x_hat, x_prior = self.generator(torch.cat((noise, noise_prior)), z).chunk(2)
        return x_hat, x_prior


class Logits(NamedTuple):
    """What the discriminators say about one batch, each of shape (n,); None if not asked for."""

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
        self.batch_norm = model.norm in ("batch", "sync")
        if table.convs:
            width = _wide(table.trunk_dim, model)
            self.trunk = nn.Sequential(
                *_conv_body(model, table, last=width), nn.LeakyReLU(SLOPE, inplace=True)
            )
        else:
            width, self.trunk = table.trunk_dim, nn.Identity()
        pair = [2 * width, *(_wide(n, model) for n in table.pair_head), 1]
        sample = [width, *(_wide(n, model) for n in table.sample_head), 1]
        head = _dense if table.convs else _tanh_mlp
        self.pair_head = head(pair)
        self.sample_head = head(sample)

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
        """Return the logits of one step, those of real samples and mismatched pairs if asked for.

        The trunk runs once over real and once over generated samples: batch norm statistics then
        never mix the two, and x is looked at once for D and D' together. Each head runs once.
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
        return self.pair_head(torch.cat((condition, candidate), dim=1)).squeeze(1)

    def sample(self, candidate: Float[Tensor, "n f"]) -> Float[Tensor, " n"]:
        """Return the logits of D' that each candidate is real."""
        return self.sample_head(candidate).squeeze(1)


def _wide(count: int, model: Model) -> int:
    """Return a hidden size scaled by ``model.width``, in multiples of 4, never under 4."""
    return count if model.width == 1 else max(4, round(count * model.width / 4) * 4)


def _dense(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.LeakyReLU(SLOPE, inplace=True)]
    return nn.Sequential(*layers[:-1])


def _tanh_mlp(sizes: list[int]) -> nn.Sequential:
    """Return a network of points; ``points.py`` differentiates it by hand."""
    inputs, hidden, outputs = sizes
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def _conv_body(model: Model, table: Architecture, last: int) -> nn.Sequential:
    """Return the convolutions of a table, flattened into one dense layer of ``last`` units."""
    channels, side, _ = table.shape
    layers: list[nn.Module] = []
    for conv in table.convs:
        out = _wide(conv.filters, model)
        valid = conv.kernel == side  # the 2x2 convolution that ends Tables 2 and 3
        padding, norm = 0 if valid else conv.kernel // 2, _norm2d(model, out, conv)
        layers += [
            fast.Conv2d(channels, out, conv.kernel, conv.stride, padding, bias=not _is_batch(norm)),
            *norm,
            nn.LeakyReLU(SLOPE, inplace=True),
        ]
        channels, side = out, 1 if valid else -(-side // conv.stride)
    layers += [nn.Flatten(), nn.Linear(channels * side * side, last)]
    return nn.Sequential(*layers)


def _deconv(
    channels: int, out: int, conv: Conv, *, bias: bool = True, image: bool = False
) -> list[nn.Module]:
    """Return a transposed convolution whose output is exactly ``stride`` times its input."""
    kernel, stride = conv.kernel, conv.stride
    if stride == 1:
        # A stride-1 transposed convolution is a convolution with a mirrored kernel; SAME padding
        # of an even kernel is one pixel more on the far side.
        near, far = (kernel - 1) // 2, kernel // 2
        pad = [nn.ZeroPad2d((near, far, near, far))] if near != far else []
        kind = fast.ImageConv2d if image else fast.Conv2d
        return [*pad, kind(channels, out, kernel, padding=0 if pad else near, bias=bias)]
    padding = max(0, -(-(kernel - stride) // 2))
    extra = stride - kernel + 2 * padding
    return [fast.ConvTranspose2d(channels, out, kernel, stride, padding, extra, bias=bias)]


def _is_batch(norm: list[nn.Module]) -> bool:
    """Return whether these are a batch norm, which takes any bias before it away again."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in norm)


def _norm2d(model: Model, channels: int, conv: Conv) -> list[nn.Module]:
    if not conv.norm or model.norm == "none":
        return []
    if model.norm == "group":
        return [nn.GroupNorm(_groups(channels), channels)]
    return [fast.SyncBatchNorm2d(channels) if model.norm == "sync" else nn.BatchNorm2d(channels)]


def _norm1d(model: Model, units: int) -> list[nn.Module]:
    if model.norm == "none":
        return []
    if model.norm == "group":
        return [nn.LayerNorm(units)]
    return [fast.SyncBatchNorm1d(units) if model.norm == "sync" else nn.BatchNorm1d(units)]


def _groups(channels: int) -> int:
    """Return the largest of 8, 4, 2, 1 that divides the channels."""
    return next(g for g in (8, 4, 2, 1) if channels % g == 0)


def initialise(network: nn.Module, seed: int) -> None:
    """Set every weight by the tables: He before a LeakyReLU, Xavier elsewhere, biases zero.

    Drawn from a generator of its own, so that the result depends on nothing but the seed. The fan
    of a strided transposed convolution is what really reaches one output: in * kernel² / stride².
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in network.modules() if not list(m.children())]
    layers = [m for m in layers if not isinstance(m, _NORMS)]
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            continue
        fan_in, fan_out = _fans(layer)
        he = isinstance(following, nn.LeakyReLU)
        std = (2 / (1 + SLOPE**2) / fan_in if he else 2 / (fan_in + fan_out)) ** 0.5
        with torch.no_grad():
            layer.weight.normal_(0, std, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def _fans(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> tuple[float, float]:
    """Return how many inputs reach one output, and how many outputs one input reaches."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    area, stride = layer.kernel_size[0] * layer.kernel_size[1], layer.stride[0] * layer.stride[1]
    if isinstance(layer, nn.ConvTranspose2d):
        return layer.in_channels * area / stride, layer.out_channels * area
    return layer.in_channels * area, layer.out_channels * area / stride
