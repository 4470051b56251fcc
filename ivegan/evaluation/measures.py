"""Numbers without figures, of any pair of encoder and generator, or of one of them."""

from pathlib import Path

import torch
from torch import nn

from ivegan.config import PROTOCOLS, Config
from ivegan.evaluation import images, mixtures, points
from ivegan.evaluation.sampling import Sampler


def of_images(
    config: Config,
    encoder: nn.Module,
    generator: nn.Module | None,
    split: images.EvaluationData,
    cache_dir: Path,
    seed: int = 0,
) -> dict[str, float]:
    """Return the numbers of an evaluation of images; of codes alone where there is no generator.

    Args:
        config: of the run.
        encoder, generator: in eval mode.
        split: train and held-out images.
        cache_dir: for the classifier and the numbers of raw pixels.
        seed: of every draw.
    """
    device = next((t.device for t in encoder.parameters()), torch.device("cpu"))
    sampler = Sampler(config, encoder, generator or nn.Identity(), device)
    codes, train_codes = sampler.encode(split.x), sampler.encode(split.train)
    result = images.of_codes(sampler, split, codes, train_codes, cache_dir, seed)
    if generator is None:
        return result
    fitted = images.fitted_prior(train_codes, len(codes), seed)
    generated = images.generation(sampler, split, codes, cache_dir, seed, fitted=fitted)
    return result | generated | images.transformation(sampler, split.x, codes, seed)


def of_points(
    config: Config,
    encoder: nn.Module | None,
    generator: nn.Module,
    seed: int = 0,
) -> dict[str, float]:
    """Return the numbers of an evaluation of points; of samples alone where there is no encoder."""
    device = next(generator.parameters()).device
    sampler = Sampler(config, encoder or nn.Identity(), generator, device)
    protocol = PROTOCOLS[config.protocol]
    count, dataset = protocol.samples, config.dataset
    result = {
        **mixtures.mixture(sampler.prior_samples(count, seed), dataset, protocol),
        **points.perfect(dataset, count, seed, protocol),
    }
    if encoder is None:
        return result
    x = points.true_points(dataset, count, seed, protocol)
    _, x_hat = points.variations(sampler, x, seed)
    return result | mixtures.reconstructed_points(x, x_hat, dataset, protocol)
