"""What changes the numbers: frozen dataclasses, and the presets where choices stand side by side.

One dotted vocabulary (``optim.lr_g``, ``model.z_dim``) is the flag on the command line, the key of
a search space, the name of the tracked parameter and the path in a checkpoint's ``config.json``.
Where and how fast a run happens (workers, storage, devices) is not here but in ``pipelines/``.

Numbers come from the paper's Tables 1-3 unless a line says otherwise; where the tables contradict
each other, the reading chosen is named beside the value.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ivegan.errors import UserError
from ivegan.storage.digest import digest
from ivegan.storage.schema import check

Norm = Literal["batch", "sync", "group", "none"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """The four networks; their layers stand in ``layers/tables.py``."""

    architecture: Literal["points", "points-deep", "digits", "mnist", "celeba"] = "mnist"
    """Which of the layer tables to build."""
    z_dim: int = 16
    """Size of the latent z = E(x), whose entries lie in (-1, 1)."""
    noise_dim: int = 4
    """Size of z', the Gaussian noise that stands for what T changes."""
    width: float = 1.0
    """Factor on every hidden channel count; 1.0 is the table as printed."""
    norm: Norm = "batch"
    """Normalisation where the tables tick "BN": batch is the paper, sync is batch norm over all
    ranks, group and none do not depend on the batch at all."""
    norm_d: Literal["same", "batch", "sync", "group", "none"] = "same"
    """The same for the discriminators' trunk, if it differs from that of E and G."""
    pair_features: Literal["concat", "difference"] = "concat"
    """What D's head sees of condition and candidate: both (the paper), or their difference and
    product too, without which D learns identity late."""
    fourier: int = 0
    """Points: octaves of sine and cosine of z that G sees beside z (Tancik et al. 2020), so that
    it can pass from mode to mode quickly."""
    fourier_x: int = 0
    """Points: the same of x, for E, D and D', so that they can tell apart what is near."""

    def __post_init__(self) -> None:
        for name in ("z_dim", "noise_dim"):
            value = getattr(self, name)
            _require(1 <= value <= 65_536, f"model.{name}", value, "from 1 to 65,536")
        _require(0 < self.width <= 64, "model.width", self.width, "greater than 0 and at most 64")
        for name in ("fourier", "fourier_x"):
            value = getattr(self, name)
            _require(0 <= value <= 64, f"model.{name}", value, "from 0 to 64")

    @property
    def trunk_norm(self) -> Norm:
        """Normalisation of the discriminators' trunk."""
        return self.norm if self.norm_d == "same" else self.norm_d


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Two Adam optimizers: one for G and E, one for D, D' and their trunk."""

    lr_g: float = 2e-4
    """Learning rate of G and E."""
    lr_d: float = 1e-4
    """Learning rate of D, D' and the trunk."""
    beta1: float = 0.7
    """First Adam coefficient, both optimizers."""
    beta2: float = 0.999
    """Second Adam coefficient, both optimizers."""
    eps: float = 1e-8
    """Adam's epsilon."""
    ema: float = 0.0
    """Decay per 1,000 images of the averaged G and E used for evaluation; 0 keeps no average."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rates over the run: as given, or rising over the first 2 % and then falling along
    half a cosine to 2 % of them."""

    def __post_init__(self) -> None:
        _require(self.lr_g > 0, "optim.lr_g", self.lr_g, "greater than 0")
        _require(self.lr_d > 0, "optim.lr_d", self.lr_d, "greater than 0")
        _require(0 <= self.beta1 < 1, "optim.beta1", self.beta1, "in [0, 1)")
        _require(0 <= self.beta2 < 1, "optim.beta2", self.beta2, "in [0, 1)")
        _require(self.eps > 0, "optim.eps", self.eps, "greater than 0")
        _require(0 <= self.ema < 1, "optim.ema", self.ema, "in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Eq. 3 and the terms that the ``-plus`` presets add."""

    loss: Literal["nonsaturating", "minimax", "relativistic"] = "nonsaturating"
    """Form of the adversarial loss: minimax is Eq. 3 to the letter, nonsaturating its usual stable
    form, relativistic compares each real logit with its fake one, for D and D' alike."""
    prior_weight: float = 1.0
    """Weight of the D' terms beside the D terms."""
    mismatched: float = 0.0
    """Weight of a second kind of fake pair, (T(y), x) with y another sample of the batch."""
    r1: float = 0.0
    """Weight of the zero-centred gradient penalty on real inputs of D and D'."""
    r2: float = 0.0
    """The same penalty on generated inputs."""
    anneal: float = 1.0
    """Factor that r1, r2 and latent reach, geometrically, after 80 % of the run: D then resolves
    what is finer."""
    invariance: float = 0.0
    """Weight of a contrastive term on codes: E(T(x)) and the code that G decodes are each other's
    nearest in the batch, so that z' and not z carries what T changes."""
    alignment: float = 0.0
    """Weight of the squared distance of these codes (Wang and Isola 2020): the contrastive term
    stops pulling once they find each other, though both still hold a little of T."""
    latent: float = 0.0
    """Weight of the mean squared error of E(G(z', z)) as an estimate of z, for E alone (VEEGAN,
    Srivastava et al. 2017): E learns where G puts what before D can tell it."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "loss":
                _require(value >= 0, f"objective.{name}", value, "0 or more")


@dataclass(frozen=True, kw_only=True)
class Transform:
    """T, the transformations the encoding must not depend on. Zero switches a part off."""

    noise_std: float = 0.0
    """Points: standard deviation of the Gaussian shift over that of a mode; Eq. 4 has 1/sqrt 2."""
    shift: float = 0.0
    """Images: largest shift in pixels, each direction, uniform."""
    rotate: float = 0.0
    """Images: largest rotation in degrees, uniform in both directions."""
    flip: bool = False
    """Images: mirror left and right with probability one half."""
    brightness: float = 0.0
    """Images: largest change of the factor on all values."""
    contrast: float = 0.0
    """Images: largest change of the factor on the distance from the image's mean grey."""
    hue: float = 0.0
    """Images: largest rotation of the hue, as a share of the full circle."""
    border: Literal["zeros", "reflection"] = "zeros"
    """Pixels outside the image: black, or its mirror image."""
    condition: bool = False
    """Apply a second T to x itself, so that every role of x sees an augmented sample: for data
    sets so small that the discriminator would memorise them. Off in the paper."""
    encoder: bool = False
    """Apply a third T to what E sees, so that E(x) cannot hold what T changes. Off in the paper."""

    def __post_init__(self) -> None:
        for name in ("noise_std", "shift", "rotate", "brightness", "contrast", "hue"):
            value = getattr(self, name)
            _require(value >= 0, f"transform.{name}", value, "0 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides what a run computes, apart from world size and threads per worker."""

    dataset: Literal["ring", "grid", "digits", "mnist", "celeba"] = "mnist"
    """What is learned: ring and grid are drawn afresh, the others are built by data_prep."""
    protocol: Literal["pacgan", "metz", "selfcond"] = "pacgan"
    """Points: whose modes to learn, and whose way to score samples."""
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    objective: Objective = field(default_factory=Objective)
    transform: Transform = field(default_factory=Transform)
    batch_size: int = 512
    """Samples per step over all workers together."""
    total_images: int = 6_000_000
    """Length of the run in samples seen; rounded up to whole steps."""
    seed: int = 0
    """Seed of the weights, the data order and every draw."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 2, "batch_size", self.batch_size, "at least 2")
        _require(self.total_images >= 1, "total_images", self.total_images, "at least 1")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")

    @property
    def total_steps(self) -> int:
        """Number of train steps, the last one whole."""
        return -(-self.total_images // self.batch_size)

    @property
    def is_points(self) -> bool:
        """Whether samples are 2-D points rather than images."""
        return self.dataset in ("ring", "grid")


def _require(holds: bool, name: str, value: object, should: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value}, but must be {should}.")


class Protocol(NamedTuple):
    """How published work draws the points of ``ring`` and ``grid``, and scores samples of them."""

    ring: float
    """Standard deviation of a mode over the ring's radius."""
    grid: float
    """The same over the grid's spacing."""
    samples: int = 2500
    box: bool = False
    """Whether a sample of high quality lies in a box of 3 stds, not in a disc."""
    all_points: bool = False
    """Whether the reverse KL counts all samples, not those of high quality."""


PROTOCOLS = {
    # The paper itself gives no Sigma.
    "pacgan": Protocol(0.01, 0.025),  # VEEGAN (2017), PacGAN (2018)
    # Unrolled GAN (2016) compares densities by eye: the same numbers, of as many points as drawn.
    "metz": Protocol(0.01, 0.025, 10_000, all_points=True),
    "selfcond": Protocol(0.005, 0.025, box=True, all_points=True),  # Self-conditioned GAN (2020)
}
# The generator ends in Tanh, so the ring of radius 1 is trained at 0.5 and the 5 x 5 grid
# {-4, -2, 0, 2, 4} divided by 5.
RING_RADIUS, GRID_SPACING = 0.5, 0.4

_RING = Config(
    dataset="ring",
    # Table 1 prints an encoder layer of 2 units under "z-dimensions 3"; the layer row is followed.
    model=Model(architecture="points", z_dim=2, noise_dim=4, norm="none"),
    optim=Optim(lr_g=2e-4, lr_d=1e-4, beta1=0.7),
    transform=Transform(noise_std=0.5**0.5),
    batch_size=1024,
    total_images=50_000 * 1024,  # "epochs 50000" of fresh samples, read as iterations
)
_MNIST = Config(
    dataset="mnist",
    model=Model(architecture="mnist", z_dim=16, noise_dim=4),
    optim=Optim(lr_g=2e-4, lr_d=1e-4, beta1=0.7),
    transform=Transform(shift=4.0, rotate=20.0),
    batch_size=512,
    total_images=100 * 60_000,
)
_CELEBA = Config(
    dataset="celeba",
    model=Model(architecture="celeba", z_dim=1024, noise_dim=16),
    optim=Optim(lr_g=2e-4, lr_d=1e-4, beta1=0.5),
    transform=Transform(
        shift=20.0,
        rotate=20.0,
        flip=True,
        brightness=0.1,
        contrast=0.1,
        hue=0.05,
        border="reflection",  # a black border would be something for D to learn
    ),
    batch_size=64,
    total_images=16 * 162_770,  # 16 epochs of the official train split
)


def _plus(config: Config, total_images: int, width: float, lr: float, **more: float) -> Config:
    """Return the preset of images with what makes it better but is not in the paper.

    EXPERIMENTS.md has the runs that each setting was chosen by. Wider networks diverge with the
    learning rates of narrow ones.
    """
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, width=width, norm="batch", norm_d="none", pair_features="difference"
        ),
        objective=Objective(
            loss="relativistic", mismatched=1.0, r1=0.2, r2=0.2, invariance=0.1, **more
        ),
        # An average of 0.966 has a half-life of 20,000 images.
        optim=Optim(lr_g=lr, lr_d=lr, beta1=0.0, beta2=0.99, ema=0.966, schedule="cosine"),
        transform=dataclasses.replace(config.transform, condition=False, encoder=True),
        batch_size=64,
        total_images=total_images,
    )


def _celeba_plus() -> Config:
    """Return ``_plus`` for faces, with larger penalties and smaller movements."""
    config = _plus(_CELEBA, total_images=4_000_000, width=0.5, lr=5e-4)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, z_dim=256),
        objective=dataclasses.replace(config.objective, r1=10.0, r2=10.0, anneal=0.1),
        transform=dataclasses.replace(config.transform, shift=8.0, rotate=10.0),
    )


def _points_plus(config: Config) -> Config:
    """Return the preset of points: deeper networks, the losses of ``_plus``, no mismatched pairs.

    Another point of the same mode would be one, and variations would be too narrow.
    """
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, architecture="points-deep", z_dim=3, fourier=8, fourier_x=6
        ),
        objective=Objective(
            loss="relativistic", prior_weight=2.0, r1=0.002, r2=0.002, latent=5.0, anneal=0.05
        ),
        optim=Optim(lr_g=2e-3, lr_d=2e-3, beta1=0.0, beta2=0.99, ema=0.98, schedule="cosine"),
        batch_size=512,
        total_images=16_000 * 512,
    )


_GRID = dataclasses.replace(_RING, dataset="grid")
# Not in the paper: its objective on the smallest real images, and mismatched pairs.
_DIGITS = Config(
    dataset="digits",
    model=Model(architecture="digits", z_dim=16, noise_dim=4, norm="none"),
    optim=Optim(lr_g=8e-4, lr_d=8e-4, beta1=0.5, ema=0.9),
    objective=Objective(mismatched=1.0),
    transform=Transform(shift=1.5, rotate=15.0, condition=True),
    batch_size=128,
    total_images=300_000,
)

PRESETS: dict[str, Config] = {
    "ring": _RING,
    "grid": _GRID,
    "digits": _DIGITS,
    "mnist": _MNIST,
    "celeba": _CELEBA,
    "ring-plus": _points_plus(_RING),
    "grid-plus": _points_plus(_GRID),
    "digits-plus": _plus(_DIGITS, total_images=150_000, width=1.0, lr=3e-3),
    "mnist-plus": _plus(_MNIST, total_images=1_500_000, width=0.5, lr=2e-3, alignment=0.2),
    "celeba-plus": _celeba_plus(),
}
"""One configuration per experiment of the paper, and its ``-plus`` variant."""


def preset(name: str) -> Config:
    """Return the preset of that name; raises UserError with the known names."""
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return config with dotted fields replaced, ``{"optim.lr_g": 1e-4}``.

    Raises:
        UserError: a name that is not a setting, or a value out of range.
    """
    known = flatten(config)
    for name, value in changes.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
            hint = f"did you mean {' or '.join(near)}" if near else "see config.py for the names"
            raise UserError(f"There is no setting {name!r}; {hint}?")
        head, _, rest = name.partition(".")
        try:
            part = dataclasses.replace(getattr(config, head), **{rest: value}) if rest else value
            config = dataclasses.replace(config, **{head: part})
        except TypeError as error:
            raise UserError(f"{name} cannot be {value!r}: see config.py for its type.") from error
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every setting under its dotted name, in the order of definition."""
    out: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out |= flatten(value, f"{prefix}{f.name}.")
        else:
            out[prefix + f.name] = value
    return out


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Any) -> Config:
    """Return the configuration that ``to_dict`` described.

    Raises:
        UserError: a field that this version does not know, or a value that is not of its type.
    """
    config = check(values, Config, "The stored configuration", "use the version that wrote it")
    if "protocol" in values:
        return config
    # T's shift of points was given in data units once.
    std = {"ring": 0.005, "grid": 0.01}.get(config.dataset, 1.0)
    return override(config, {"transform.noise_std": config.transform.noise_std / std})


def config_hash(config: Config) -> str:
    """Return the sha256 of the configuration's canonical JSON, as 64 hexadecimal digits."""
    return digest(to_dict(config))
