"""Encoders trained on two transformations of each image: SimCLR and VICReg. No generator.

The representation is E(x), of ``z_dim`` entries; the loss is taken after a projection of it that is
thrown away. The losses are written from the papers: the libraries that have them bring a framework.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, normalize

from ivegan import order
from ivegan.baselines.training import Baseline
from ivegan.config import Config
from ivegan.layers.build import dense, initialise, wide
from ivegan.layers.tables import ARCHITECTURES
from ivegan.networks import Encoder
from ivegan.shapes import Float
from ivegan.transforms import transform


class Siamese(Baseline):
    """E and a projection of two dense layers, as wide as D's trunk.

    Args:
        config: of the run.
        compare: the loss of two sets of projected views, ``nt_xent`` or ``vicreg``.
    """

    def __init__(self, config: Config, compare: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.config, self.compare = config, compare
        self.encoder = Encoder(config.model)
        table = ARCHITECTURES[config.model.architecture]
        width = wide(table.trunk_dim, config.model)
        self.projection = dense([config.model.z_dim, width, width], table.activation)
        initialise(self.encoder, order.weights_seed(config.seed, 0))
        initialise(self.projection, order.weights_seed(config.seed, 1))

    def loss(self, x: Tensor, draws: order.Draws) -> Tensor:
        """Return the loss of two views of x, encoded as one batch."""
        t = self.config.transform
        views = torch.cat((transform(x, draws.transform, t), transform(x, draws.encoder, t)))
        first, second = self.projection(self.encoder(views)).chunk(2)
        return self.compare(first, second)


def nt_xent(
    first: Float[Tensor, "n d"], second: Float[Tensor, "n d"], temperature: float = 0.5
) -> Float[Tensor, ""]:
    """Return the normalised, temperature-scaled cross-entropy of SimCLR (Chen et al. 2020, Eq. 1).

    The two views of an image find each other among all of the batch.
    """
    views = normalize(torch.cat((first, second)))
    similarity = views @ views.T / temperature
    similarity = similarity.masked_fill(
        torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf
    )
    partners = torch.arange(len(views), device=views.device).roll(len(first))
    return cross_entropy(similarity, partners)


def vicreg(first: Float[Tensor, "n d"], second: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Return the loss of VICReg (Bardes et al. 2022), weighed as in its authors' code.

    Views are equal, entries vary, and are not correlated.
    """
    loss = 25.0 * mse_loss(first, second)
    for view in (first, second):
        centred = view - view.mean(0)
        spread = (centred.square().sum(0) / (len(view) - 1) + 1e-4).sqrt()
        correlated = (centred.T @ centred / (len(view) - 1)).square()
        off_diagonal = correlated.sum() - correlated.diagonal().sum()
        loss = loss + 25.0 / 2 * (1 - spread).relu().mean()  # half for each view
        loss = loss + off_diagonal / view.shape[1]
    return loss
