"""The 1,797 handwritten digits that come inside scikit-learn: a data set without a download.

Values 0 to 16 become 0 to 255, and 8 x 8 pixels 16 x 16 by bilinear resizing, because three
halvings need them. The split is fixed and stratified: 1,347 train, 150 valid and 300 test images,
with each digit's share in every one.
"""

import functools
import hashlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data_prep.source import Source
from ivegan.data.tars import Sample
from ivegan.errors import UserError

OPTIONS = frozenset[str]()
SIDE = 16
SPLIT_SEED = 0
COUNTS = {"train": 1347, "valid": 150, "test": 300}


def describe(source: str | None, name: str) -> Source:
    """Return what there is to build.

    Raises:
        UserError: a source was given, and there is none to read.
    """
    if source is not None:
        raise UserError("The digits come with scikit-learn: leave --source out.")
    images, labels = _digits()
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    return Source(
        dataset=name,
        image_shape=(1, SIDE, SIDE),
        splits=COUNTS,
        sources={"sklearn.datasets.load_digits": digest},
        settings={
            "image": "8x8 values 0..16 scaled to 0..255, bilinear to 16x16",
            "split": f"stratified, seed {SPLIT_SEED}",
        },
        label_names=tuple("0123456789"),
    )


def read(source: str | None, split: str, start: int, stop: int) -> Iterator[Sample]:
    """Yield the samples of one split from start to stop."""
    images, labels = _digits()
    for place in _split()[split][start:stop]:
        grey = np.rint(images[place] * (255 / 16)).astype(np.uint8)
        large = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        meta = {"label": int(labels[place]), "source": f"load_digits#{place}"}
        yield Sample(f"{place:06d}", np.asarray(large)[None], meta)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images (1797, 8, 8) with values 0 to 16, and labels (1797,)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.asarray(images, np.uint8).reshape(-1, 8, 8), np.asarray(labels, np.uint8)


@functools.cache
def _split() -> dict[str, np.ndarray]:
    """Return the places of each split, ascending.

    Each digit's places are shuffled and laid end to end in turn, digit after digit, so that any
    stretch of the row holds the digits in proportion; no library's splitting is relied on.
    """
    _, labels = _digits()
    rng = np.random.default_rng(SPLIT_SEED)
    place = np.empty(len(labels))
    for digit in range(10):
        mine = np.flatnonzero(labels == digit)
        place[rng.permutation(mine)] = (np.arange(len(mine)) + 0.5) / len(mine)
    row = np.argsort(place, kind="stable")
    cuts = np.cumsum(list(COUNTS.values()))[:-1]
    parts = np.split(row, cuts)
    return {name: np.sort(part) for name, part in zip(COUNTS, parts, strict=True)}
