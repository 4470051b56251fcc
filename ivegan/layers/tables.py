"""The layer tables: Tables 1-3 of the paper, row by row, and two architectures of this project."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn


class Conv(NamedTuple):
    """One row of a table: kernel and stride are square, filters are counted at width 1."""

    kernel: int
    stride: int
    filters: int
    norm: bool = True


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The layer table of one experiment."""

    shape: tuple[int, ...]
    """Shape of one sample: (channels, height, width), or (2,) for points."""
    convs: tuple[Conv, ...] = ()
    """Convolutions of E and of D_enc; empty for points."""
    trunk_dim: int
    """Units in the last layer of D_enc."""
    base: tuple[int, int] = (0, 0)
    """(filters, side) of the feature map that G's dense layer is reshaped to."""
    deconvs: tuple[Conv, ...] = ()
    """Transposed convolutions of G; the last one makes the image."""
    pair_head: tuple[int, ...]
    """Hidden units of D's head."""
    sample_head: tuple[int, ...]
    """Hidden units of the head for single samples, D'."""
    hidden: tuple[int, ...] = ()
    """Points: hidden units of E and of G."""
    activation: type[nn.Module] = nn.LeakyReLU
    """What follows a hidden dense layer."""


ARCHITECTURES: dict[str, Architecture] = {
    "points": Architecture(
        shape=(2,),
        trunk_dim=2,
        pair_head=(128,),
        sample_head=(128,),
        hidden=(128,),
        activation=nn.Tanh,
    ),
    # Not in the paper: one hidden layer cannot draw eight narrow modes from a uniform prior.
    "points-deep": Architecture(
        shape=(2,),
        trunk_dim=2,
        pair_head=(128, 128),
        sample_head=(128, 128),
        hidden=(128, 128, 128),
    ),
    # Not in the paper: small enough to learn in minutes on two cores.
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
