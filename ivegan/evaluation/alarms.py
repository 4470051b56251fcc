"""Signs that training learns nothing, from its losses and from G and E on a few images.

discriminator_won        D or D' separates real from generated samples without error
discriminator_at_chance  D' does not separate them at all
codes_collapsed          E gives different images the same code
noise_ignored            G(z', E(x)) is the same image for every z'
"""

from collections import deque
from collections.abc import Mapping

import numpy as np
import torch

from ivegan.config import Config
from ivegan.losses import discriminator_loss
from ivegan.networks import EncoderGenerator, in_eval_mode
from ivegan.transforms import to_float

SENTENCES = {
    "discriminator_won": "a discriminator separates real from generated samples without error, so "
    "E and G learn nothing: lower optim.lr_d, or add gradient penalties (objective.r1, r2)",
    "discriminator_at_chance": "D' does not separate real from generated samples: raise "
    "optim.lr_d or model.width",
    "codes_collapsed": "E gives all images nearly the same code: lower optim.lr_g, or change the "
    "seed",
    "noise_ignored": "G draws nearly the same image for every z': check that transform.* is not 0, "
    "or set objective.invariance",
}
_WINDOW = 10  # flushes
_WON, _CHANCE = 0.02, 0.005  # of the loss of a discriminator that knows nothing
_COLLAPSED = 0.02  # standard deviation of codes, whose entries lie in (-1, 1)
_IGNORED = 0.02  # share of the spread between images


class Alarms:
    """Watches one run; each alarm is raised once."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._raised: set[str] = set()
        alike = torch.zeros(1)
        chance = float(discriminator_loss(alike, alike, config.objective.loss))
        self._chance = {
            "loss/D": chance * (1 + config.objective.mismatched),
            "loss/D_prime": chance,
        }
        self._shares: deque[dict[str, float]] = deque(maxlen=_WINDOW)

    def of_losses(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the alarms of a flush's losses, after some of the kind."""
        self._shares.append({name: metrics[name] / self._chance[name] for name in self._chance})
        if len(self._shares) < _WINDOW:
            return []
        highest = {name: max(share[name] for share in self._shares) for name in self._chance}
        distance = max(abs(share["loss/D_prime"] - 1) for share in self._shares)
        found = {
            "discriminator_won": min(highest.values()) < _WON,
            "discriminator_at_chance": distance < _CHANCE,
        }
        return self._new(found)

    @torch.no_grad()
    def of_networks(self, networks: EncoderGenerator, images: np.ndarray) -> list[str]:
        """Return the alarms of E's codes and G's variations of two or more images, uint8."""
        device = next(networks.parameters()).device
        draws = torch.Generator().manual_seed(0)
        with in_eval_mode(networks):
            codes = networks.encoder(to_float(torch.from_numpy(np.array(images))).to(device))
            noise = torch.randn(4, len(codes), self._config.model.noise_dim, generator=draws)
            x_hat = torch.stack([networks.generator(one.to(device), codes) for one in noise])
        by_noise = x_hat.std(0).mean()
        by_image = x_hat.std(1).mean()
        return self._new(
            {
                "codes_collapsed": bool(codes.std(0).mean() < _COLLAPSED),
                "noise_ignored": bool(by_noise < _IGNORED * by_image),
            }
        )

    def _new(self, found: Mapping[str, bool]) -> list[str]:
        new = [name for name, holds in found.items() if holds and name not in self._raised]
        self._raised.update(new)
        return new
