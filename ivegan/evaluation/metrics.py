"""Measures of samples and codes, as pure functions: arrays in, floats out.

Nothing here loads a checkpoint, a data set or a picture. Protocols and their published numbers:
modes, high-quality share and reverse KL as in VEEGAN (2017) and PacGAN (2018); k-means accuracy and
NMI as in the clustering literature; the Fréchet distance as in Heusel et al. (2017), in whatever
feature space it is given.
"""

from typing import NamedTuple

import numpy as np

from ivegan.errors import UserError
from ivegan.shapes import Float, Int

# --- Generated images ---------------------------------------------------------------------------


def frechet_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets of features, 0 if equal.

    |mean_a - mean_b|² + tr(A) + tr(B) - 2 tr((A B)^1/2) with covariances A and B. With the QR
    factors of the centred sets, A = Ra' Ra and B = Rb' Rb, the last trace is the sum of the
    singular values of Ra Rb': no matrix square root, and no trouble with singular covariances.

    Raises:
        UserError: fewer than two samples, or features that are not finite.
    """
    mean_a, root_a = _gaussian(a)
    mean_b, root_b = _gaussian(b)
    shared = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    spread = np.square(root_a).sum() + np.square(root_b).sum() - 2 * shared
    return float(np.square(mean_a - mean_b).sum() + max(spread, 0.0))


def _gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and R, with R' R the covariance of the features."""
    if len(features) < 2:
        raise UserError(
            f"A Fréchet distance needs at least 2 samples in each set, but one has {len(features)}."
        )
    x = np.asarray(features, dtype=np.float64)
    if not np.isfinite(x).all():
        raise UserError("Some features are not finite: the networks of this checkpoint diverged.")
    mean = x.mean(axis=0)
    return mean, np.linalg.qr(x - mean, mode="r") / np.sqrt(len(x) - 1)


def coverage_of(
    real: Float[np.ndarray, "n d"], fake: Float[np.ndarray, "m d"], *, neighbours: int = 5
) -> dict[str, float]:
    """Return precision and recall (Kynkäänniemi 2019), density and coverage (Naeem 2020).

    A sample lies in the manifold of a set if it is nearer to a member than that member's k-th
    neighbour. ``precision``: share of fake samples in the real manifold; ``recall``: share of real
    samples in the fake one; ``density``: real balls around a fake sample, over k; ``coverage``:
    share of real balls with a fake sample inside. All are 1 for equal sets, but for chance.
    """
    from sklearn.metrics import pairwise_distances
    from sklearn.neighbors import NearestNeighbors

    if min(len(real), len(fake)) <= neighbours:
        raise UserError(f"Precision and recall need more than {neighbours} samples in each set.")

    def radii(samples: np.ndarray) -> np.ndarray:
        model = NearestNeighbors(n_neighbors=neighbours).fit(samples)
        return model.kneighbors()[0][:, -1]  # of each sample, itself left out

    distances = pairwise_distances(real, fake)
    in_real = distances <= radii(real)[:, None]
    in_fake = distances <= radii(fake)[None]
    return {
        "precision": float(in_real.any(axis=0).mean()),
        "recall": float(in_fake.any(axis=1).mean()),
        "density": float(in_real.sum(axis=0).mean() / neighbours),
        "coverage": float(in_real.any(axis=1).mean()),
    }


def label_agreement(
    labels: Int[np.ndarray, " n"], predicted: Int[np.ndarray, "k n"]
) -> tuple[float, float]:
    """Return the share of predictions equal to their sample's label, and the same by chance.

    Chance is the exact mean over all ways to shuffle the pairs, not one shuffle.

    Args:
        labels: of the samples x.
        predicted: a classifier's labels of G(z', E(x)), one row per draw of z'.
    """
    count = int(max(labels.max(), predicted.max())) + 1
    share = np.bincount(labels, minlength=count) / labels.size
    predicted_share = np.bincount(predicted.ravel(), minlength=count) / predicted.size
    return float(np.mean(predicted == labels)), float(share @ predicted_share)


def attribute_agreement(
    attributes: Int[np.ndarray, "n a"], predicted: Int[np.ndarray, "k n a"]
) -> tuple[float, float]:
    """Return the balanced accuracy of predicted 0/1 attributes, mean over attributes, and chance.

    Balanced, because always saying "no" is right about 80 % of the time on CelebA; chance is 0.5.
    Attributes that all samples share are left out.
    """
    on = attributes == 1
    hit = (predicted == attributes).mean(axis=0)
    varied = on.any(axis=0) & ~on.all(axis=0)
    if not varied.any():
        raise UserError("No attribute differs between these samples: evaluate more of them.")
    right_on = (hit * on).sum(axis=0)[varied] / on.sum(axis=0)[varied]
    right_off = (hit * ~on).sum(axis=0)[varied] / (~on).sum(axis=0)[varied]
    return float((right_on + right_off).mean() / 2), 0.5


def variation_ratio(
    generated: Float[np.ndarray, "k n ..."], transformed: Float[np.ndarray, "k n ..."]
) -> float:
    """Return how much z' moves G(z', E(x)) against how much T moves x, as a ratio of stds.

    0: z' is ignored. 1: as varied as the transformations it stands for.
    """
    wanted = transformed.var(axis=0, ddof=1).mean()
    return float(np.sqrt(generated.var(axis=0, ddof=1).mean() / wanted)) if wanted > 0 else 0.0


# --- Codes --------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """Codes, or other rows of floats (n, d), with classes (n,) or 0/1 attributes (n, a)."""

    codes: np.ndarray
    labels: np.ndarray


def nearest_neighbour_accuracy(train: Labelled, test: Labelled) -> float:
    """Return how often the nearest train code has the test code's label."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(n_neighbors=1, algorithm="brute")
    return float(model.fit(*train).score(*test))


def linear_probe_accuracy(train: Labelled, test: Labelled) -> float:
    """Return the test accuracy of a logistic regression on standardised train codes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(train.labels)) < 2:
        raise UserError("A linear probe needs two classes in the train split: use more samples.")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-4))
    return float(model.fit(*train).score(*test))


def few_label_accuracy(train: Labelled, test: Labelled, *, seed: int = 0) -> float:
    """Return the mean accuracy of linear probes on 10 labels per class, over 5 draws of these."""
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(5):
        order = rng.permutation(len(train.codes))
        labels = train.labels[order]
        few = np.concatenate([order[labels == c][:10] for c in np.unique(labels)])
        chosen = Labelled(train.codes[few], train.labels[few])
        scores.append(linear_probe_accuracy(chosen, test))
    return float(np.mean(scores))


def saturation(codes: Float[np.ndarray, "n d"]) -> float:
    """Return the share of entries beyond 0.99, where Tanh is flat."""
    return float((np.abs(codes) > 0.99).mean())


def neighbour_purity(
    positions: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n a"], *, neighbours: int = 10
) -> tuple[float, float]:
    """Return how often the neighbours of a sample with an attribute have it too, and chance.

    Means over attributes. Neighbours are the nearest in ``positions``, as of a t-SNE map.
    """
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=neighbours).fit(positions).kneighbors()[1]
    columns = [labels[:, a] for a in range(labels.shape[1]) if labels[:, a].any()]
    if not columns:
        raise UserError("No sample has one of these attributes: evaluate more of them.")
    purity = [column[near[column == 1]].mean() for column in columns]
    return float(np.mean(purity)), float(np.mean([column.mean() for column in columns]))


def attribute_probes(train: Labelled, test: Labelled) -> dict[str, float]:
    """Return the means, over 0/1 attributes, of a linear probe's scores on test codes.

    ``attribute_auroc``: area under the ROC curve. ``attribute_ap``: average precision, whose chance
    level is ``attribute_ap_chance``, the share of positives. ``attribute_balanced``: balanced
    accuracy, at the threshold that is best on the train codes.

    The probes are ridge regressions on standardised codes, solved for all attributes at once.
    Attributes that all train or all test samples share are left out.
    """
    from sklearn.linear_model import Ridge
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), Ridge(alpha=1.0))
    model.fit(train.codes, train.labels.astype(np.float64))
    train_scores, scores = model.predict(train.codes), model.predict(test.codes)
    rows = []
    for a, (train_truth, truth) in enumerate(zip(train.labels.T, test.labels.T, strict=True)):
        if len(np.unique(truth)) < 2 or len(np.unique(train_truth)) < 2:
            continue
        false, true, thresholds = roc_curve(train_truth, train_scores[:, a])
        positive = scores[:, a] >= thresholds[(true - false).argmax()]
        balanced = (positive[truth == 1].mean() + 1 - positive[truth == 0].mean()) / 2
        precision = average_precision_score(truth, scores[:, a])
        rows.append((roc_auc_score(truth, scores[:, a]), precision, truth.mean(), balanced))
    if not rows:
        raise UserError("No attribute differs between these samples: evaluate more of them.")
    names = ("auroc", "ap", "ap_chance", "balanced")
    means = np.mean(rows, axis=0)
    return {f"attribute_{name}": float(value) for name, value in zip(names, means, strict=True)}


def clustering(
    codes: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], *, seed: int = 0
) -> tuple[float, float]:
    """Return (NMI, accuracy) of k-means with as many clusters as there are classes.

    Accuracy is that of the best one-to-one match of clusters to classes.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    classes, labels = np.unique(labels, return_inverse=True)
    k = len(classes)
    model = KMeans(k, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
    found = model.fit_predict(codes)
    counts = np.zeros((k, k), dtype=np.int64)
    np.add.at(counts, (found, labels), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    nmi = normalized_mutual_info_score(labels, found)
    return float(nmi), float(counts[rows, columns].sum() / len(labels))


def retrieval_accuracy(
    codes: Float[np.ndarray, "n d"], transformed_codes: Float[np.ndarray, "n d"]
) -> float:
    """Return how often E(T(x)) is nearer to E(x) than to the code of any other sample.

    1 is an encoding that T does not move past its neighbours; chance is 1 / n.
    """
    from sklearn.metrics import pairwise_distances_argmin

    nearest = pairwise_distances_argmin(transformed_codes, codes)
    return float(np.mean(nearest == np.arange(len(codes))))
