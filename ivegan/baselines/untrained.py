"""Encoders that no gradient has trained: PCA, and E with its first weights."""

import numpy as np
import torch
from torch import nn

from ivegan import order
from ivegan.baselines.training import Baseline
from ivegan.config import Config
from ivegan.layers.build import initialise
from ivegan.networks import Encoder
from ivegan.shapes import UInt8
from ivegan.transforms import to_float


class Untrained(Baseline):
    """An encoder without a generator."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.eval()


def random_encoder(config: Config) -> Untrained:
    """Return E as IVE-GAN's training begins with it."""
    encoder = Encoder(config.model)
    initialise(encoder, order.weights_seed(config.seed, 0))
    return Untrained(encoder)


def pca(config: Config, images: UInt8[np.ndarray, "n c h w"]) -> Untrained:
    """Return the projection on as many principal components of images as z has entries."""
    from sklearn.decomposition import PCA

    pixels = to_float(torch.from_numpy(np.array(images))).flatten(1)
    fitted = PCA(config.model.z_dim, random_state=config.seed).fit(pixels.numpy())
    projection = nn.Linear(pixels.shape[1], config.model.z_dim).requires_grad_(False)
    projection.weight.copy_(torch.from_numpy(fitted.components_))
    projection.bias.copy_(-projection.weight @ torch.from_numpy(fitted.mean_))
    return Untrained(nn.Sequential(nn.Flatten(), projection))
