"""The terms of Eq. 3 as functions of logits, to be minimised, and what the ``-plus`` presets add.

Table 1 ends D in Tanh, Tables 2 and 3 in a linear unit; (1 + tanh u) / 2 = sigmoid(2u), so the only
sensible reading of the former is the latter up to a factor, and every discriminator ends linear.
softplus(-l) = -log sigmoid(l) and softplus(l) = -log(1 - sigmoid(l)), both exact at any logit.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from ivegan.shapes import Float

Loss = Literal["nonsaturating", "minimax", "relativistic"]

TEMPERATURE = 0.5  # of ``invariance_loss``, in squared units of z, whose entries lie in (-1, 1)


def discriminator_loss(
    real: Float[Tensor, " n"], fake: Float[Tensor, " n"], loss: Loss
) -> Float[Tensor, ""]:
    """Return what a discriminator minimises: -log D(real) - log(1 - D(fake)), averaged (Eq. 3).

    The relativistic form asks each real logit to exceed its own fake one instead
    (Jolicoeur-Martineau 2019; R3GAN 2024).
    """
    if loss == "relativistic":
        return softplus(fake - real).mean()
    return softplus(-real).mean() + softplus(fake).mean()


def generator_loss(
    real: Float[Tensor, " n"] | None, fake: Float[Tensor, " n"], loss: Loss
) -> Float[Tensor, ""]:
    """Return what G and E minimise against one discriminator.

    "nonsaturating" is -log D(fake); "minimax" is log(1 - D(fake)), Eq. 3 to the letter, whose
    gradient vanishes when D is sure; only "relativistic" uses the real logits.
    """
    if loss == "relativistic":
        assert real is not None, "the relativistic loss compares with real logits"
        return softplus(real - fake).mean()
    if loss == "minimax":
        return -softplus(fake).mean()
    return softplus(-fake).mean()


def gradient_penalty(
    logits: Float[Tensor, " m"], inputs: tuple[Float[Tensor, "n ..."], ...]
) -> Float[Tensor, ""]:
    """Return half the mean squared norm of d logits / d inputs, taken over all inputs together.

    Zero-centred, on real inputs it is R1 and on generated ones R2 (Mescheder et al. 2018).
    """
    gradients = torch.autograd.grad(logits.sum(), inputs, create_graph=True)
    return 0.5 * sum((g.flatten(1).square().sum(1).mean() for g in gradients), logits.new_zeros(()))


def invariance_loss(
    z: Float[Tensor, "n z"], others: Float[Tensor, "m z"], first: int = 0
) -> Float[Tensor, ""]:
    """Return how hard it is to find each code's partner by distance (InfoNCE, Oord et al. 2018).

    Args:
        z: codes of one transformation of each sample.
        others: codes of another transformation of the same samples, of all ranks.
        first: place in ``others`` of the partner of the first code.
    """
    # The squared distance without |z|^2, which is the same for all candidates of a code.
    similarity = (2 * z @ others.T - others.square().sum(1)) / TEMPERATURE
    partners = torch.arange(first, first + len(z), device=z.device)
    return cross_entropy(similarity, partners)
