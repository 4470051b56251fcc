"""Measures of samples and codes, as pure functions: arrays in, floats out.

Nothing here loads a checkpoint, a data set or a picture. Protocols and their published numbers:
modes, high-quality share and reverse KL as in VEEGAN (2017) and PacGAN (2018); k-means accuracy and
NMI as in the clustering literature; the Fréchet distance as in Heusel et al. (2017), in whatever
feature space it is given.
"""

import numpy as np

from ivegan.errors import UserError
from ivegan.order import modes
from ivegan.shapes import Float, Int

HIGH_QUALITY_STDS = 3.0
# A spread is measured over points at most this many stds from their mode: all of a Gaussian up to
# twice too wide, and hardly anything of the bridges that a continuous G draws between modes.
_SPREAD_STDS = 6.0


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


def nearest_neighbour_accuracy(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
) -> float:
    """Return how often the nearest train code has the test code's label."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(n_neighbors=1, algorithm="brute").fit(train, train_labels)
    return float(model.score(test, test_labels))


def linear_probe_accuracy(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, " m"],
) -> float:
    """Return the test accuracy of a logistic regression on standardised train codes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(train_labels)) < 2:
        raise UserError("A linear probe needs two classes in the train split: use more samples.")
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-4))
    return float(model.fit(train, train_labels).score(test, test_labels))


def attribute_probes(
    train: Float[np.ndarray, "n d"],
    train_attributes: Int[np.ndarray, "n a"],
    test: Float[np.ndarray, "m d"],
    test_attributes: Int[np.ndarray, "m a"],
) -> dict[str, float]:
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
    model.fit(train, train_attributes.astype(np.float64))
    train_scores, scores = model.predict(train), model.predict(test)
    rows = []
    for a, truth in enumerate(test_attributes.T):
        if len(np.unique(truth)) < 2 or len(np.unique(train_attributes[:, a])) < 2:
            continue
        false, true, thresholds = roc_curve(train_attributes[:, a], train_scores[:, a])
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


# --- Mixtures of Gaussians ----------------------------------------------------------------------


def nearest_modes(
    points: Float[np.ndarray, "n 2"], dataset: str
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return each point's nearest mode, and the distance to it in standard deviations."""
    means, std = modes(dataset)
    distances = np.linalg.norm(points[:, None, :] - means[None], axis=2) / std
    nearest = distances.argmin(axis=1)
    return nearest, distances[np.arange(len(points)), nearest]


def mixture(points: Float[np.ndarray, "n 2"], dataset: str) -> dict[str, float]:
    """Return how well points cover ``ring`` or ``grid``, each number free of the data's scale.

    ``modes``: modes that are nearest to at least one high-quality point.
    ``high_quality``: share of points within 3 stds of a mode; a perfect sampler has 0.98889, and
    more than that is too narrow rather than better.
    ``reverse_kl``: KL divergence, in nats, of the modes' shares of high-quality points from equal
    shares; ln K, the worst there is, where there are no such points.
    ``reverse_kl_all``: the same over all points.
    ``std_ratio``: std of one mode's points over the data's, mean over modes, with its extremes.
    """
    if not np.isfinite(points).all():
        raise UserError("Some points are not finite: the networks of this checkpoint diverged.")
    means, std = modes(dataset)
    nearest, distance = nearest_modes(points, dataset)
    good = distance <= HIGH_QUALITY_STDS
    counts = np.bincount(nearest[good], minlength=len(means))
    ratios = _std_ratios(points, nearest, distance, std) or [0.0]
    return {
        "modes": float(np.count_nonzero(counts)),
        "high_quality": float(good.mean()),
        "reverse_kl": _kl_from_uniform(counts),
        "reverse_kl_all": _kl_from_uniform(np.bincount(nearest, minlength=len(means))),
        "std_ratio": float(np.mean(ratios)),
        "std_ratio_min": float(np.min(ratios)),
        "std_ratio_max": float(np.max(ratios)),
    }


def reconstructed_points(
    x: Float[np.ndarray, "n 2"], x_hat: Float[np.ndarray, "k n 2"], dataset: str
) -> dict[str, float]:
    """Return how well G(z', E(x)) follows x: to its mode, and from there with T's spread.

    ``right_mode``: share of variations whose nearest mode is that of x.
    ``residual_std_ratio``: std of G(z', E(x)) - x over that of T, sigma / sqrt(2), for variations
    in the right mode; 1 is D's optimum.
    ``residual_p``: p-value of a Kolmogorov-Smirnov test that these are distributed as T's shifts.
    """
    from scipy.stats import kstest

    _, std = modes(dataset)
    target = std / np.sqrt(2)
    wanted, _ = nearest_modes(x, dataset)
    found = np.stack([nearest_modes(points, dataset)[0] for points in x_hat])
    right = found == wanted
    residuals = (x_hat - x)[right]
    if len(residuals) < 2:
        return {"right_mode": float(right.mean()), "residual_std_ratio": 0.0, "residual_p": 0.0}
    return {
        "right_mode": float(right.mean()),
        # About zero, not about their mean: a constant offset is an error too.
        "residual_std_ratio": float(np.sqrt(np.square(residuals).mean()) / target),
        "residual_p": float(kstest(residuals.ravel() / target, "norm").pvalue),
    }


def _std_ratios(
    points: np.ndarray, nearest: np.ndarray, distance: np.ndarray, std: float
) -> list[float]:
    """Return the std ratio of every mode that has two points or more."""
    ratios = []
    for mode in np.unique(nearest):
        own = points[nearest == mode]
        close = own[distance[nearest == mode] <= _SPREAD_STDS]
        own = close if len(close) > 1 else own  # nothing is near: say how far the rest spreads
        if len(own) > 1:
            ratios.append(float(np.sqrt(own.var(axis=0, ddof=1).mean()) / std))
    return ratios


def _kl_from_uniform(counts: np.ndarray) -> float:
    """Return the KL divergence of a histogram from the uniform one, ln K minus its entropy."""
    if not counts.sum():
        return float(np.log(len(counts)))
    p = counts[counts > 0] / counts.sum()
    return float(np.log(len(counts)) + (p * np.log(p)).sum())
