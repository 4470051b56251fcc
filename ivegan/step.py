"""One step of training, and the loop of steps. Read this first.

Symbols, here and in ``losses.py``, with the paper's letters:

    x        real samples: points (n, 2), or images (n, c, h, w) with values in [0, 1]
    tx       T(x), a random transformation of x
    z        E(x), the latent; z_prior is one drawn from the prior, uniform on (-1, 1)
    noise    z', Gaussian; it stands for what T changes
    x_hat    G(z', E(x)), a variation of x
    x_prior  G(z', z), a sample from the prior
    D        judges pairs (candidate, x);  D_prime, the paper's D', judges single samples

n counts the samples of one rank; ``config.batch_size`` counts those of all ranks together.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ivegan import order, points
from ivegan.config import Config
from ivegan.losses import discriminator_loss, generator_loss, gradient_penalty
from ivegan.networks import Discriminators, EncoderGenerator, Logits, initialise
from ivegan.transforms import transform


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number: the run has diverged."""


@dataclass
class State:
    """All that training changes; what a checkpoint holds."""

    config: Config
    players: nn.Module
    """E and G: an ``EncoderGenerator``, inside DDP where there are several ranks."""
    judges: nn.Module
    """D, D' and their trunk: ``Discriminators``, inside DDP where there are several ranks."""
    optimizer_g: torch.optim.Adam
    optimizer_d: torch.optim.Adam
    average: nn.Module | None
    """Exponential moving average of E and G, where ``optim.ema`` asks for one."""
    precision: torch.dtype = torch.float32
    """What the networks compute in; weights, losses and optimizers are float32 in any case."""
    parts: int = 1
    """How many parts a rank's batch is computed in, one after the other."""
    step: int = 0
    """Steps taken so far; with the seed, the whole random state of a run."""

    @property
    def images_seen(self) -> int:
        """Samples seen so far, over all ranks."""
        return self.step * self.config.batch_size

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.players.parameters()).device

    @property
    def encoder_generator(self) -> EncoderGenerator:
        """E and G without their DDP wrapper."""
        return cast(EncoderGenerator, _bare(self.players))

    @property
    def discriminators(self) -> Discriminators:
        """D and D' without their DDP wrapper."""
        return cast(Discriminators, _bare(self.judges))


def _bare(network: nn.Module) -> nn.Module:
    """Return a network without its DDP wrapper."""
    return getattr(network, "module", network)


def create_state(
    config: Config,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
) -> State:
    """Return the state before the first step: seeded networks and fresh optimizers.

    Args:
        config: all that the numbers depend on, but for the precision.
        device: where the networks go.
        precision: what they compute in, ``torch.bfloat16`` where the device has units for it.
    """
    players, judges = EncoderGenerator(config.model), Discriminators(config.model)
    initialise(players.encoder, order.weights_seed(config.seed, 0))
    initialise(players.generator, order.weights_seed(config.seed, 1))
    initialise(judges, order.weights_seed(config.seed, 2))
    if not config.is_points:
        # The layout that convolutions are fastest in, on CPUs and GPUs alike; values do not change.
        for network in (players, judges):
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return make_state(config, players.to(device), judges.to(device), precision)


def make_state(
    config: Config,
    players: nn.Module,
    judges: nn.Module,
    precision: torch.dtype = torch.float32,
) -> State:
    """Return the state before the first step of networks that are there."""
    o = config.optim

    def adam(network: nn.Module, lr: float) -> torch.optim.Adam:
        return torch.optim.Adam(
            network.parameters(), lr=lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=True
        )

    return State(
        config=config,
        players=players,
        judges=judges,
        optimizer_g=adam(players, o.lr_g),
        optimizer_d=adam(judges, o.lr_d),
        average=deepcopy(players).requires_grad_(False) if o.ema else None,
        precision=precision,
    )


def distribute(state: State) -> None:
    """Wrap the networks for data-parallel training, where there is more than one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    ids = [state.device.index] if state.device.type == "cuda" else None
    for name in ("players", "judges"):
        wrapped = DistributedDataParallel(getattr(state, name), device_ids=ids)
        # The ranks' batch norm statistics stay their own, and rank 0's are kept. Set afterwards:
        # the constructor's argument changed its name between torch 2.11 and 2.13.
        wrapped.broadcast_buffers = False
        setattr(state, name, wrapped)


def train_step(state: State, x: Tensor, draws: order.Draws) -> dict[str, Tensor]:
    """Update D and D', then E and G, on one batch; return its losses and logits as scalars.

    Of several games at once (``seeds.py``) everything has a first dimension for the game.

    Args:
        state: changed in place.
        x: this rank's real samples, on the state's device.
        draws: the random numbers that go with them, on the same device.
    """
    config = state.config
    if config.transform.condition:
        x = transform(x, draws.condition, config.transform)
    tx = transform(x, draws.transform, config.transform)
    update = points.update if points.possible(state) else _update
    scalars = update(state, x, tx, draws)
    state.step += 1
    _update_average(state)
    return {name: value.detach() for name, value in scalars.items()}


def _update(state: State, x: Tensor, tx: Tensor, draws: order.Draws) -> dict[str, Tensor]:
    """Update the networks of a state, and return the scalars."""
    objective = state.config.objective
    # The gradients are means over parts: one, unless memory is too small for the whole batch.
    tensors = (x, tx, draws.noise, draws.z_prior, draws.noise_prior)
    parts = [_Part(*some) for some in zip(*(t.chunk(state.parts) for t in tensors), strict=True)]
    count, scalars, kept = len(parts), [], []

    # D and D': tell T(x) from G's variation of x, and real samples from prior samples.
    state.optimizer_d.zero_grad(set_to_none=True)
    for i, part in enumerate(parts):
        # G runs once: the graph of this pass serves the second phase too, because only D changes.
        # With several parts it would fill the memory, and is not kept.
        with torch.set_grad_enabled(count == 1):
            x_hat, x_prior = _generate(state, part)
        if count == 1:
            kept.append((x_hat, x_prior))
        with _reduced(state.judges, i == count - 1):
            loss_D, loss_D_prime, penalty, logits = _judge(
                state, part.x, part.tx, x_hat.detach(), x_prior.detach()
            )
            loss = loss_D + objective.prior_weight * loss_D_prime + penalty
            (loss / count).sum().backward()
        said = {
            "logit/D_real": logits.pair_real,
            "logit/D_fake": logits.pair_fake,
            "logit/D_prime_real": logits.sample_real,
            "logit/D_prime_fake": logits.sample_fake,
        }
        means = {name: v.mean(-1) for name, v in said.items() if v is not None}
        scalars.append({"loss/D": loss_D, "loss/D_prime": loss_D_prime, **means})
    state.optimizer_d.step()

    # E and G: fool both. D is frozen, and called without DDP: it has nothing to synchronise.
    D = _bare(state.judges).requires_grad_(False)
    state.optimizer_g.zero_grad(set_to_none=True)
    for i, part in enumerate(parts):
        with _reduced(state.players, i == count - 1):
            x_hat, x_prior = kept[i] if kept else _generate(state, part)
            real = objective.loss == "relativistic"  # no other loss looks at them in this phase
            fooled = _logits(state, D, part.x, part.tx, x_hat, x_prior, real=real)
            loss_G = generator_loss(fooled.pair_real, fooled.pair_fake, objective.loss)
            loss_G_prior = generator_loss(fooled.sample_real, fooled.sample_fake, objective.loss)
            ((loss_G + objective.prior_weight * loss_G_prior) / count).sum().backward()
        scalars[i] |= {"loss/GE_pair": loss_G, "loss/GE_prior": loss_G_prior}
    state.optimizer_g.step()
    D.requires_grad_(True)

    if count == 1:
        return scalars[0]
    return {k: torch.stack([one[k].detach() for one in scalars]).mean(0) for k in scalars[0]}


class _Part(NamedTuple):
    """What a part of a batch is trained on."""

    x: Tensor
    tx: Tensor
    noise: Tensor
    z_prior: Tensor
    noise_prior: Tensor


def _generate(state: State, part: _Part) -> tuple[Tensor, Tensor]:
    """Return x_hat and x_prior."""
    with _autocast(state):
        return state.players(part.x, part.noise, part.z_prior, part.noise_prior)


def _reduced(network: nn.Module, now: bool) -> AbstractContextManager[None]:
    """Let the ranks' gradients be averaged in the backward pass of the last part alone."""
    wrapped = isinstance(network, DistributedDataParallel)
    return network.no_sync() if wrapped and not now else nullcontext()


def _judge(
    state: State, x: Tensor, tx: Tensor, x_hat: Tensor, x_prior: Tensor
) -> tuple[Tensor, Tensor, Tensor, Logits]:
    """Return what D minimises, what D' minimises, their gradient penalties, and the logits."""
    objective = state.config.objective
    penalised = bool(objective.r1 or objective.r2)
    if penalised:
        x, tx, x_hat, x_prior = (v.detach().requires_grad_() for v in (x, tx, x_hat, x_prior))
    mismatched = bool(objective.mismatched)
    logits = _logits(state, state.judges, x, tx, x_hat, x_prior, mismatched=mismatched)
    assert logits.pair_real is not None, "real samples are looked at unless told otherwise"
    assert logits.sample_real is not None, "real samples are looked at unless told otherwise"
    loss_D = discriminator_loss(logits.pair_real, logits.pair_fake, objective.loss)
    if logits.pair_mismatched is not None:
        loss_D = loss_D + objective.mismatched * discriminator_loss(
            logits.pair_real, logits.pair_mismatched, objective.loss
        )
    loss_D_prime = discriminator_loss(logits.sample_real, logits.sample_fake, objective.loss)
    penalty = torch.zeros_like(loss_D)
    if objective.r1:
        real = logits.pair_real + logits.sample_real
        penalty = penalty + objective.r1 * gradient_penalty(real, (x, tx))
    if objective.r2:
        fake = logits.pair_fake + logits.sample_fake
        penalty = penalty + objective.r2 * gradient_penalty(fake, (x_hat, x_prior))
    return loss_D, loss_D_prime, penalty, logits


def _logits(state: State, judges: nn.Module, *images: Tensor, **which: bool) -> Logits:
    """Return what D and D' say, in the precision in which losses are computed."""
    with _autocast(state):
        logits: Logits = judges(*images, **which)
    if state.precision == torch.float32:
        return logits
    return Logits(*(cast(Tensor, None if part is None else part.float()) for part in logits))


def _autocast(state: State) -> AbstractContextManager[object]:
    if state.precision == torch.float32:
        return nullcontext()
    return torch.autocast(state.device.type, state.precision)


@torch.no_grad()
def _update_average(state: State) -> None:
    """Move the averaged E and G towards the present ones; buffers are simply copied."""
    if state.average is None:
        return
    keep = state.config.optim.ema ** (state.config.batch_size / 1000)
    present = _bare(state.players)
    for ours, theirs in zip(state.average.parameters(), present.parameters(), strict=True):
        ours.lerp_(theirs, 1 - keep)
    for ours, theirs in zip(state.average.buffers(), present.buffers(), strict=True):
        ours.copy_(theirs)


@dataclass(frozen=True)
class Progress:
    """Where a run stands: the means since the last progress, over all ranks."""

    step: int
    images_seen: int
    metrics: dict[str, float]


def train(
    state: State, batches: Iterator[tuple[Tensor, order.Draws]], every_images: int
) -> Iterator[Progress]:
    """Train to ``config.total_steps``, yielding progress about every so many images and at the end.

    The caller decides what a progress is for: a line, a metric, a checkpoint. Losses are summed on
    the device and read only here, so the steps between two yields never wait for the host.

    Args:
        state: changed in place; steps already taken are not taken again.
        batches: this rank's samples and draws, from the state's present step on.
        every_images: images between two yields, rounded up to whole steps.

    Raises:
        NonFiniteLossError: training has diverged; the last checkpoint is still good.
    """
    every = max(1, math.ceil(every_images / state.config.batch_size))
    state.players.train()
    state.judges.train()
    sums: dict[str, Tensor] = {}
    count = 0
    while state.step < state.config.total_steps:
        x, draws = next(batches)
        scalars = train_step(state, x, draws)
        sums = {name: sums[name] + v for name, v in scalars.items()} if sums else scalars
        count += 1
        if state.step % every == 0 or state.step == state.config.total_steps:
            yield Progress(state.step, state.images_seen, _means(sums, count))
            sums, count = {}, 0


def _means(sums: dict[str, Tensor], count: int) -> dict[str, float]:
    """Return the mean of every scalar over the steps and the ranks."""
    values = torch.stack(list(sums.values())) / count
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    means = dict(zip(sums, values.tolist(), strict=True))
    for name, value in means.items():
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{name} is {value}; lower the learning rates or change the seed."
            )
    return means
