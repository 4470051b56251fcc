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


def convolutions(network: nn.Module) -> list[tuple[int, int, int]]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    return [
        (m.kernel_size[0], m.stride[0], m.out_channels)
        for m in network.modules()
        if isinstance(m, kinds)
    ]


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in network.modules())


def linears(network: nn.Module) -> list[int]:
    return [m.out_features for m in network.modules() if isinstance(m, nn.Linear)]


def test_the_mnist_networks_are_table_2():
    model = preset("mnist").model
    body = [(5, 2, 64), (3, 2, 128), (3, 2, 256), (3, 2, 256), (2, 1, 256)]
    encoder, generator, discriminators = Encoder(model), Generator(model), Discriminators(model)
    assert convolutions(encoder) == body
    assert linears(encoder) == [16]  # z_dim, read with D_enc's 1024 transposed
    assert convolutions(generator) == [(3, 2, 256), (3, 2, 128), (5, 2, 64), (5, 1, 1)]
    assert linears(generator) == [4096]
    assert norms(generator) == 3
    assert convolutions(discriminators.trunk) == body
    assert linears(discriminators.trunk) == [1024]
    assert linears(discriminators.pair_head) == [128, 64, 16, 1]
    assert linears(discriminators.sample_head) == [64, 1]
    assert norms(encoder) == norms(discriminators.trunk) == 5


def test_the_celeba_networks_are_table_3():
    model = preset("celeba").model
    encoder, generator, discriminators = Encoder(model), Generator(model), Discriminators(model)
    assert convolutions(encoder) == [
        (5, 2, 128), (5, 2, 128), (5, 2, 256), (3, 2, 256), (3, 2, 512), (3, 2, 512), (2, 1, 1024),
    ]  # fmt: skip
    assert linears(encoder) == [1024]
    assert convolutions(generator) == [
        (2, 2, 512), (2, 1, 512), (3, 2, 256), (3, 1, 256), (3, 2, 256), (3, 1, 256),
        (5, 2, 128), (5, 1, 128), (5, 2, 128), (5, 1, 128), (5, 2, 64), (5, 1, 3),
    ]  # fmt: skip
    assert linears(generator) == [4096]
    assert norms(generator) == 10
    assert linears(discriminators.pair_head) == [1024, 512, 128, 1]
    assert linears(discriminators.sample_head) == [128, 1]


def test_the_ring_networks_are_table_1():
    model = preset("ring").model
    assert linears(Encoder(model)) == [128, 2]
    assert linears(Generator(model)) == [128, 2]
    discriminators = Discriminators(model)
    assert linears(discriminators.pair_head) == linears(discriminators.sample_head) == [128, 1]


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
    layers = list(generator.body.children())[:-2]
    signal = torch.randn(8, model.noise_dim + model.z_dim)
    for layer in layers:
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
