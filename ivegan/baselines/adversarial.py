"""GAN, PacGAN2 and BiGAN / ALI, with the adversarial loss and penalties of the configuration."""

import torch
from torch import Tensor, nn

from ivegan import order
from ivegan.baselines.training import Baseline, Phase
from ivegan.config import Config
from ivegan.layers.build import dense, initialise, wide
from ivegan.layers.tables import ARCHITECTURES
from ivegan.losses import discriminator_loss, generator_loss, gradient_penalty
from ivegan.networks import Discriminators, Encoder, Generator


class Critic(nn.Module):
    """The trunk of IVE-GAN's discriminators under one head.

    Args:
        config: of the run.
        hidden: hidden units of the head.
        packed: samples that are judged together.
        z_dim: entries of a code that is judged with each sample.
    """

    def __init__(
        self, config: Config, hidden: tuple[int, ...], *, packed: int = 1, z_dim: int = 0
    ) -> None:
        super().__init__()
        model = config.model
        table = ARCHITECTURES[model.architecture]
        discriminators = Discriminators(model)
        self.packed, self.trunk = packed, discriminators.trunk
        inputs = packed * discriminators.width + z_dim
        self.head = dense([inputs, *(wide(n, model) for n in hidden), 1], table.activation)
        initialise(self, order.weights_seed(config.seed, 2))

    def forward(self, x: Tensor, *codes: Tensor) -> Tensor:
        features = torch.cat((self.trunk(x), *codes), dim=1)
        return self.head(features.unflatten(0, (-1, self.packed)).flatten(1)).squeeze(1)


class GAN(Baseline):
    """Goodfellow et al. 2014; with ``packed`` 2, PacGAN2 (Lin et al. 2018)."""

    def __init__(self, config: Config, *, packed: int = 1) -> None:
        super().__init__()
        self.config = config
        self.generator = Generator(config.model)
        initialise(self.generator, order.weights_seed(config.seed, 1))
        table = ARCHITECTURES[config.model.architecture]
        self.critic = Critic(config, table.sample_head, packed=packed)

    def phases(self) -> list[Phase]:
        optim = self.config.optim
        return [
            Phase(self.critic, optim.lr_d, self.critic_loss),
            Phase(self.generator_side(), optim.lr_g, self.generator_loss),
        ]

    def generator_side(self) -> nn.Module:
        """Return what trains against the critic."""
        return self.generator

    def inputs(
        self, x: Tensor, draws: order.Draws
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return what the critic takes as real and as fake."""
        return (x,), (self.generator(draws.noise_prior, draws.z_prior),)

    def critic_loss(self, x: Tensor, draws: order.Draws) -> Tensor:
        """Return the critic's loss with its gradient penalties."""
        o = self.config.objective
        with torch.no_grad():
            pairs = self.inputs(x, draws)
        real, fake = (tuple(t.detach().requires_grad_() for t in inputs) for inputs in pairs)
        real_logits, fake_logits = self.critic(*real), self.critic(*fake)
        loss = discriminator_loss(real_logits, fake_logits, o.loss)
        # A penalty is the mean over samples, of which a logit has several.
        weight = self.annealing * self.critic.packed
        if o.r1:
            loss = loss + weight * o.r1 * gradient_penalty(real_logits, real)
        if o.r2:
            loss = loss + weight * o.r2 * gradient_penalty(fake_logits, fake)
        return loss

    def generator_loss(self, x: Tensor, draws: order.Draws) -> Tensor:
        """Return the generator's loss."""
        real, fake = self.inputs(x, draws)
        return generator_loss(self.critic(*real), self.critic(*fake), self.config.objective.loss)


class BiGAN(GAN):
    """Donahue et al. and Dumoulin et al. 2017: the critic takes (x, E(x)) and (G(z', z), z)."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.encoder = Encoder(config.model)
        initialise(self.encoder, order.weights_seed(config.seed, 0))
        table = ARCHITECTURES[config.model.architecture]
        self.critic = Critic(config, table.pair_head, z_dim=config.model.z_dim)

    def generator_side(self) -> nn.Module:
        return nn.ModuleList((self.generator, self.encoder))

    def inputs(
        self, x: Tensor, draws: order.Draws
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        (x,), (fake,) = super().inputs(x, draws)
        return (x, self.encoder(x)), (fake, draws.z_prior)

    def generator_loss(self, x: Tensor, draws: order.Draws) -> Tensor:
        """Return the loss of G, and of E, which makes real pairs look generated."""
        real, fake = (self.critic(*inputs) for inputs in self.inputs(x, draws))
        kind = self.config.objective.loss
        loss = generator_loss(real, fake, kind)
        # The relativistic loss trains both sides already.
        return loss if kind == "relativistic" else loss + generator_loss(None, -real, kind)
