"""Adam with the run's schedule, which stops by itself at a gradient that is not finite.

A fused Adam skips its update where ``found_inf`` is one (torch's gradient scaler uses it). Here it
is set on the device from the gradients, which are equal on all ranks by then, so no step waits for
the host. It stays set, so the weights remain those before the first step that failed.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ivegan.config import Config

ANNEALED = 0.8  # share of the run after which ``objective.anneal`` is reached
WARM_UP, FLOOR = 0.02, 0.02  # of the cosine schedule: share of the run, share of the rate


class Optimizer(torch.optim.Adam):
    """Adam of one side, whose learning rate follows ``optim.schedule`` from its highest, ``lr``."""

    def __init__(self, network: nn.Module, lr: float, config: Config) -> None:
        o, device = config.optim, next(network.parameters()).device
        cuda = device.type == "cuda"
        super().__init__(
            network.parameters(),
            # A captured step reads its learning rate from the device.
            lr=torch.tensor(lr, device=device) if cuda else lr,
            betas=(o.beta1, o.beta2),
            eps=o.eps,
            fused=True,
            capturable=cuda,
        )
        self._highest, self._config = lr, config
        self._good_steps = torch.zeros((), device=device, dtype=torch.float32)  # since ``_start``
        self._start = 0
        self.found_inf = torch.zeros((), device=device, dtype=torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments and steps; rate and kind of the update stay those of this device."""
        names = ("lr", "fused", "capturable")
        own = [{name: group[name] for name in names} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, settings in zip(self.param_groups, own, strict=True):
            group.update(settings)

    def schedule(self, step: int) -> None:
        """Set the learning rate of a step, counted from 0."""
        if self._config.optim.schedule == "constant":
            return
        lr = self._highest * cosine(step / self._config.total_steps)
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update the parameters, unless this gradient or an earlier one is not finite."""
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        failed = ~get_total_norm(gradients).isfinite()
        self.found_inf.copy_(torch.maximum(self.found_inf, failed.float()))
        self._good_steps += 1 - self.found_inf
        super().step()

    def first_skipped_step(self) -> int | None:
        """Return the number of the first step that was skipped, from 1, since the last restart."""
        if not self.found_inf.item():
            return None
        return self._start + int(self._good_steps.item()) + 1

    @property
    def guard(self) -> tuple[Tensor, Tensor]:
        """The tensors that remember whether a gradient was not finite, and since when."""
        return self.found_inf, self._good_steps

    def restart(self, step: int) -> None:
        """Count from a checkpoint's step."""
        self._start = step
        self._good_steps.zero_()


def cosine(progress: float) -> float:
    """Return the factor on the learning rate at a share of the run, in [0, 1]."""
    falling = FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * progress)) / 2
    return min(1.0, max(progress, 1e-3) / WARM_UP) * falling


def annealing(config: Config, step: int) -> float:
    """Return the factor on what ``objective.anneal`` names, 1 at the start of the run."""
    return config.objective.anneal ** min(1.0, step / (ANNEALED * config.total_steps))
