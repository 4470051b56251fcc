"""The networks have the shapes and sizes that the paper's tables print."""

import pytest
import torch
from torch import nn

from ivegan.config import Model, override, preset
from ivegan.layers.build import initialise
from ivegan.layers.tables import ARCHITECTURES
from ivegan.networks import Discriminators, Encoder, EncoderGenerator, Fourier, Generator


def small(name: str) -> Model:
    return override(preset(name), {"model.width": 0.125, "model.z_dim": 5}).model


@pytest.mark.parametrize("name", ["ring", "digits", "mnist", "celeba"])
def test_every_network_maps_its_shapes(name):
    model = small(name)
    shape = ARCHITECTURES[model.architecture].shape
    x = torch.rand(4, *shape)
    z = Encoder(model)(x)
    assert z.shape == (4, 5)
    assert z.abs().max() < 1
    noise = torch.randn(4, model.noise_dim)
    images = Generator(model)(noise, z)
    assert images.shape == x.shape
    low = -1 if name == "ring" else 0
    assert images.min() >= low
    assert images.max() <= 1
    x_hat, x_prior, *_ = EncoderGenerator(model)(x, noise, z, noise)
    logits = Discriminators(model)(x, x, x_hat, x_prior, mismatched=True)
    assert all(logit.shape == (4,) for logit in logits)


def layers(network: nn.Module) -> list[tuple[int, ...] | int]:
    """Return kernel, stride and filters of each convolution, and the units of each dense layer."""
    found: list[tuple[int, ...] | int] = []
    for m in network.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
            found.append((m.kernel_size[0], m.stride[0], m.out_channels))
        elif isinstance(m, nn.Linear):
            found.append(m.out_features)
    return found


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in network.modules())


BODY2 = [(5, 2, 64), (3, 2, 128), (3, 2, 256), (3, 2, 256), (2, 1, 256)]
BODY3 = [
    (5, 2, 128), (5, 2, 128), (5, 2, 256), (3, 2, 256), (3, 2, 512), (3, 2, 512), (2, 1, 1024),
]  # fmt: skip
DECONVS3 = [
    (2, 2, 512), (2, 1, 512), (3, 2, 256), (3, 1, 256), (3, 2, 256), (3, 1, 256),
    (5, 2, 128), (5, 1, 128), (5, 2, 128), (5, 1, 128), (5, 2, 64), (5, 1, 3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "encoder", "generator", "trunk", "heads", "num_norms"),
    [
        ("ring", [128, 2], [128, 2], [], ([128, 1], [128, 1]), (0, 0)),
        # z_dim is read with D_enc's 1024 transposed
        ("mnist", [*BODY2, 16], [4096, (3, 2, 256), (3, 2, 128), (5, 2, 64), (5, 1, 1)],
         [*BODY2, 1024], ([128, 64, 16, 1], [64, 1]), (5, 3)),
        ("celeba", [*BODY3, 1024], [4096, *DECONVS3], [*BODY3, 1024],
         ([1024, 512, 128, 1], [128, 1]), (7, 10)),
    ],
)  # fmt: skip
def test_the_networks_are_tables_1_to_3(name, encoder, generator, trunk, heads, num_norms):
    model = preset(name).model
    e, g, d = Encoder(model), Generator(model), Discriminators(model)
    assert [layers(n) for n in (e, g, d.trunk)] == [encoder, generator, trunk]
    assert (layers(d.pair_head), layers(d.sample_head)) == heads
    assert (norms(e), norms(g)) == num_norms
    assert norms(d.trunk) == norms(e)


def test_initialisation_is_he_or_xavier_and_depends_on_the_seed_alone():
    model = preset("mnist").model
    one, two, other = (Generator(model) for _ in range(3))
    initialise(one, 1)
    initialise(two, 1)
    initialise(other, 2)
    for (name, a), b, c in zip(
        one.named_parameters(), two.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        if a.ndim > 1:
            assert not torch.equal(a, c), name
    dense = next(m for m in one.modules() if isinstance(m, nn.Linear))
    he = (2 / (1 + 0.2**2) / dense.in_features) ** 0.5
    assert dense.weight.std().item() == pytest.approx(he, rel=0.03)
    assert dense.bias is None  # a batch norm follows
    image = [m for m in one.modules() if isinstance(m, nn.Conv2d)][-1]
    assert image.bias is not None
    assert not image.bias.any()


def test_a_signal_keeps_its_size_through_fresh_networks():
    """The strided fans are right: no layer shrinks or blows up what passes through it."""
    model = override(preset("celeba"), {"model.width": 0.25, "model.norm": "none"}).model
    generator = Generator(model)
    initialise(generator, 0)
    signal = torch.randn(8, model.noise_dim + model.z_dim)
    for layer in list(generator.body.children())[:-2]:
        signal = layer(signal)
    assert 0.2 < signal.std().item() < 5


def test_the_mismatched_pair_is_a_neighbours_and_independent_of_ranks():
    discriminators = Discriminators(override(preset("ring"), {"model.z_dim": 2}).model)
    x, tx = torch.rand(2, 8, 2)
    whole = discriminators(x, tx, x, x, mismatched=True).pair_mismatched
    halves = [
        discriminators(x[s], tx[s], x[s], x[s], mismatched=True).pair_mismatched
        for s in (slice(4), slice(4, 8))
    ]
    torch.testing.assert_close(torch.cat(halves), whole)
    swapped = tx[[1, 0, 3, 2, 5, 4, 7, 6]]
    torch.testing.assert_close(discriminators.pair(swapped, x), whole)


def test_the_difference_features_and_octaves_widen_the_first_layers():
    plain, rich = (
        override(
            preset("ring"),
            {"model.pair_features": kind, "model.fourier": octaves, "model.fourier_x": octaves},
        ).model
        for kind, octaves in (("concat", 0), ("difference", 3))
    )
    first = [next(Discriminators(m).pair_head.parameters()).shape for m in (plain, rich)]
    assert first == [(128, 4), (128, 4 * 2 * 7)]
    inputs = [next(Generator(m).parameters()).shape[1] for m in (plain, rich)]
    assert inputs == [4 + 2, 4 + 2 * 7]
    assert [next(Encoder(m).parameters()).shape[1] for m in (plain, rich)] == [2, 2 * 7]


def test_octaves_are_sines_and_cosines_of_equal_slope():
    x = torch.tensor([[0.25, -0.5]])
    quarter = 2**-0.5  # sine and cosine of an eighth of a turn
    sines, cosines = [quarter, 1 / 2, -1, 0], [quarter, 0, 0, -1 / 2]
    expected = [0.25, -0.5, *sines, *cosines]
    torch.testing.assert_close(Fourier(2, 2)(x), torch.tensor([expected]))
    torch.testing.assert_close(Fourier(2, 0)(x), x)
