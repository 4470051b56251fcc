"""The loop that baselines share: IVE-GAN's data order, draws, optimizer, schedule and average."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ivegan import order
from ivegan.config import Config
from ivegan.optimizer import Optimizer, annealing
from ivegan.step import NonFiniteLossError


class Phase(NamedTuple):
    """One update of a step."""

    networks: nn.Module
    """What is updated."""
    lr: float
    loss: Callable[[Tensor, order.Draws], Tensor]
    """Of samples and the step's random numbers."""


class Baseline(nn.Module):
    """The networks of one method, and its losses."""

    config: Config
    annealing: float = 1.0
    """This step's factor on gradient penalties."""

    @property
    def trained(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The encoder and the generator, None for what the method does not have."""
        return getattr(self, "encoder", None), getattr(self, "generator", None)

    def phases(self) -> list[Phase]:
        """Return the updates of one step, in their order."""
        return [Phase(self, self.config.optim.lr_g, self.loss)]

    def loss(self, x: Tensor, draws: order.Draws) -> Tensor:
        """Return the loss of methods that update all networks at once."""
        raise NotImplementedError


def train(
    baseline: Baseline, batches: Iterator[tuple[Tensor, order.Draws]], config: Config
) -> Baseline:
    """Train to ``config.total_steps`` and return the networks in eval mode, averaged if configured.

    Raises:
        NonFiniteLossError: training has diverged.
    """
    baseline.train()
    phases = [(Optimizer(phase.networks, phase.lr, config), phase) for phase in baseline.phases()]
    decay = config.optim.ema ** (config.batch_size / 1000)
    average = AveragedModel(baseline, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for step in range(config.total_steps):
        x, draws = next(batches)
        baseline.annealing = annealing(config, step)
        for optimizer, phase in phases:
            optimizer.schedule(step)
            optimizer.zero_grad()
            phase.loss(x, draws).backward()
            optimizer.step()
        average.update_parameters(baseline)
    for optimizer, _ in phases:
        if failed := optimizer.first_skipped_step():
            raise NonFiniteLossError(f"A gradient was infinite or not a number in step {failed:,}.")
    trained = average.module if config.optim.ema else baseline
    assert isinstance(trained, Baseline)
    return trained.eval()
