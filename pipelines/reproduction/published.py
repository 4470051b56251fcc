"""Published numbers for the columns of the tables, each read in its source; none is from memory.

Networks, budgets and samples differ from ours: PacGAN's generator for points has four layers of 400
units, and the clustering papers choose z as they like.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One method's numbers as its source prints them."""

    method: str
    source: str
    metrics: dict[str, str]


def _points(method: str, source: str, modes: str, quality: str, kl: str = "") -> Published:
    metrics = {"modes": modes, "high_quality": quality, "reverse_kl": kl}
    return Published(method, source, {k: v for k, v in metrics.items() if v})


_VEEGAN, _PACGAN = "VEEGAN 2017, table 1", "PacGAN 2018, table 1"
_IIC, _SLOGAN = "IIC 2019, table 1", "SLOGAN 2022, table 1"
_CODES = [
    Published("BiGAN, 50 numbers", "BiGAN 2017, table 1", {"one_nn": "97.4 %"}),
    Published("k-means on pixels", _IIC, {"kmeans_accuracy": "57.2 %"}),
    Published("k-means on an autoencoder", _IIC, {"kmeans_accuracy": "81.2 %"}),
    Published("k-means on a VAE", _IIC, {"kmeans_accuracy": "83.2 %"}),
    Published("IIC, ten classes learned", _IIC, {"kmeans_accuracy": "98.4 ± 0.7 %"}),
    Published(
        "ClusterGAN",
        "its authors' repository",
        {"kmeans_accuracy": "91.0 ± 4.0 %", "kmeans_nmi": "0.85 ± 0.04"},
    ),
    Published("InfoGAN", _SLOGAN, {"kmeans_nmi": "0.90 ± 0.03"}),
    Published("SLOGAN", _SLOGAN, {"kmeans_nmi": "0.92 ± 0.00"}),
    Published(
        "DEC-DA, shifts and rotations",
        "its authors' repository",
        {"kmeans_accuracy": "98.5 %", "kmeans_nmi": "0.96"},
    ),
]

PUBLISHED: dict[str, list[Published]] = {
    "ring": [
        _points("GAN", _VEEGAN, "1", "99.3 %"),
        _points("ALI", _VEEGAN, "2.8", "0.13 %"),
        _points("Unrolled GAN", _VEEGAN, "7.6", "35.6 %"),
        _points("VEEGAN", _VEEGAN, "8", "52.9 %"),
        _points("GAN", _PACGAN, "6.3 ± 0.5", "98.2 ± 0.2 %", "0.45 ± 0.09"),
        _points("ALI", _PACGAN, "6.6 ± 0.3", "97.6 ± 0.4 %", "0.36 ± 0.04"),
        _points("PacGAN2", _PACGAN, "7.9 ± 0.1", "95.6 ± 2.0 %", "0.07 ± 0.03"),
        _points("PacGAN3", _PACGAN, "7.8 ± 0.1", "97.7 ± 0.3 %", "0.10 ± 0.02"),
    ],
    "grid": [
        _points("GAN", _VEEGAN, "3.3", "0.5 %"),
        _points("VEEGAN", _VEEGAN, "24.6", "40 %"),
        _points("GAN", _PACGAN, "17.3 ± 0.8", "94.8 ± 0.7 %", "0.70 ± 0.07"),
        _points("ALI", _PACGAN, "24.1 ± 0.4", "95.7 ± 0.6 %", "0.14 ± 0.03"),
        _points("PacGAN2", _PACGAN, "23.8 ± 0.7", "91.3 ± 0.8 %", "0.13 ± 0.04"),
        _points("PacGAN4", _PACGAN, "24.8 ± 0.2", "93.6 ± 0.6 %", "0.04 ± 0.01"),
    ],
    "mnist-z16": _CODES,
    "mnist-z3": _CODES,
}
"""By task. The spreads of PacGAN's table are standard errors of ten runs; ours are deviations."""
