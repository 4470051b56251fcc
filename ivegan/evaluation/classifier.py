"""A small classifier, trained here on the train split, that judges what the generator draws.

It is a measuring instrument: it never takes part in training IVE-GAN. Its labels say whether
G(z', E(x)) is still the same digit as x, and its last hidden layer is the feature space of the
Fréchet distance. It is trained under shifts and rotations as wide as T's, because that is what the
generator's images look like, and always on one CPU thread, so that its weights do not depend on how
many cores a machine has. Trained once per data set, then kept in the cache.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, binary_cross_entropy_with_logits, cross_entropy

from ivegan.config import Transform
from ivegan.order import NUM_TRANSFORM_DRAWS
from ivegan.shapes import Float, UInt8
from ivegan.storage import local, local_sentences
from ivegan.storage.digest import digest, is_sound, write_sums
from ivegan.transforms import to_float, transform

log = logging.getLogger(__name__)

_WEIGHTS = "weights.safetensors"
_BATCH = 512  # of a forward pass; what comes out does not depend on it


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the classifier is built and trained; its cached weights are kept under a hash of this."""

    side: int = 32
    """Larger images are averaged down to this many pixels."""
    channels: tuple[int, int, int] = (24, 48, 96)
    """Filters of the three convolutions, each followed by halving."""
    num_features: int = 64
    """Units of the last hidden layer."""
    images: int = 40_000
    """Images seen in training, at least; small sets are gone through many times."""
    epochs: int = 4
    """Times that every image is seen, at least; large sets decide by this."""
    batch_size: int = 128
    lr: float = 4e-3
    """Highest learning rate of the one-cycle schedule."""
    shift: float = 0.125
    """Largest shift in training, as a share of the side."""
    rotate: float = 20.0
    """Largest rotation in training, in degrees."""
    seed: int = 0


DEFAULT = Settings()


class Classifier(nn.Module):
    """Images in [0, 1] -> logits: one per class, or one per attribute."""

    def __init__(self, settings: Settings, shape: tuple[int, ...], labels: np.ndarray) -> None:
        super().__init__()
        self.multi_label = labels.ndim == 2
        num_outputs = labels.shape[1] if self.multi_label else int(labels.max()) + 1
        self.side = min(settings.side, shape[1])
        layers: list[nn.Module] = []
        before = shape[0]
        for channels in settings.channels:
            layers += [nn.Conv2d(before, channels, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]
            before = channels
        units = before * (self.side // 2 ** len(settings.channels)) ** 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(units, settings.num_features))
        self.head = nn.Linear(settings.num_features, num_outputs)

    def features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        """Return the last hidden layer of images in [0, 1]."""
        return self.body(self.shrink(x)).relu()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.head(self.features(x))

    def shrink(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c s s"]:
        """Return the images averaged down to the size that the convolutions take."""
        return x if x.shape[-1] == self.side else adaptive_avg_pool2d(x, self.side)


def classifier_of(
    images: np.ndarray,
    labels: np.ndarray,
    dataset_hash: str,
    cache_dir: Path,
    settings: Settings = DEFAULT,
) -> Classifier:
    """Return the classifier of a data set in eval mode, from the cache or trained now.

    Args:
        images: uint8 train images (n, c, h, w).
        labels: classes (n,), or 0/1 attributes (n, a).
        dataset_hash: names the data in the cache.
    """
    key = digest({"dataset": dataset_hash, "samples": len(images), **asdict(settings)})
    folder = cache_dir / f"classifier-{key[:16]}"
    with local_sentences(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Of several processes that want it at once, the trials of a sweep say, one trains it.
        with local.lock(folder.with_suffix(".lock")):
            if not is_sound(folder):
                log.info("training the classifier of the evaluation, once per data set")
                model = train_classifier(images, labels, settings)
                # A cache may be shared by nodes whose locks do not reach each other.
                with TemporaryDirectory(dir=cache_dir, prefix=".classifier-") as unfinished:
                    fresh = Path(unfinished) / "new"
                    fresh.mkdir()
                    (fresh / _WEIGHTS).write_bytes(save(model.state_dict()))
                    write_sums(fresh)
                    local.delete_folder(folder)
                    fresh.rename(folder)
    model = Classifier(settings, images.shape[1:], labels)
    model.load_state_dict(load_file(folder / _WEIGHTS))
    return model.eval()


def train_classifier(
    images: np.ndarray, labels: np.ndarray, settings: Settings = DEFAULT
) -> Classifier:
    """Return a classifier in eval mode; a pure function of its arguments."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(images, labels, settings)
    finally:
        torch.set_num_threads(threads)


def _train(images: np.ndarray, labels: np.ndarray, settings: Settings) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = Classifier(settings, images.shape[1:], labels)
    generator = torch.Generator().manual_seed(settings.seed)
    moves = Transform(shift=settings.shift * model.side, rotate=settings.rotate)
    batch_size = min(settings.batch_size, len(images))
    steps = max(settings.images, settings.epochs * len(images)) // batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
    kind, loss_of = (
        (np.float32, binary_cross_entropy_with_logits)
        if model.multi_label
        else (np.int64, cross_entropy)
    )
    targets = torch.from_numpy(np.asarray(labels, kind))
    model.train()
    rest = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        if len(rest) < batch_size:
            rest = torch.randperm(len(images), generator=generator)
        chosen, rest = rest[:batch_size], rest[batch_size:]
        x = model.shrink(to_float(torch.from_numpy(images[chosen.numpy()])))
        x = transform(x, torch.rand(batch_size, NUM_TRANSFORM_DRAWS, generator=generator), moves)
        loss = loss_of(model(x), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 5) == 0:
            log.info("classifier: step %d of %d, loss %.3f", step + 1, steps, loss.item())
    return model.eval()


@torch.no_grad()
def classify(
    model: Classifier, images: UInt8[np.ndarray, "n c h w"]
) -> tuple[np.ndarray, Float[np.ndarray, "n f"]]:
    """Return predicted labels, classes (n,) or 0/1 attributes (n, a), and features."""
    device = model.head.weight.device
    labels, features = [], []
    for start in range(0, len(images), _BATCH):
        x = torch.from_numpy(np.array(images[start : start + _BATCH])).to(device)
        hidden = model.features(to_float(x))
        logits = model.head(hidden)
        labels.append((logits > 0).long() if model.multi_label else logits.argmax(dim=1))
        features.append(hidden.cpu().numpy())
    return torch.cat(labels).cpu().numpy(), np.concatenate(features)
