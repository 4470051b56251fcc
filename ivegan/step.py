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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ivegan import order
from ivegan.config import Config
from ivegan.layers.build import initialise
from ivegan.losses import discriminator_loss, generator_loss, gradient_penalty, invariance_loss
from ivegan.networks import Discriminators, EncoderGenerator, Generated, Logits
from ivegan.optimizer import Optimizer, annealing
from ivegan.transforms import transform

_REMEDY = "lower the learning rates or change the seed"


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient became infinite or not a number: the run has diverged."""


@dataclass
class State:
    """Everything that training changes, and everything that a checkpoint holds."""

    config: Config
    generator_side: nn.Module
    """E and G: an ``EncoderGenerator``, inside DDP where there are several ranks."""
    discriminator_side: nn.Module
    """D, D' and their trunk: ``Discriminators``, inside DDP where there are several ranks."""
    optimizer_g: Optimizer
    optimizer_d: Optimizer
    average: EncoderGenerator | None
    """Exponential moving average of E and G, if ``optim.ema`` is not zero."""
    annealing: Tensor
    """This step's factor on what ``objective.anneal`` names; read on the device."""
    precision: torch.dtype = torch.float32
    """What the networks compute in; weights, losses and optimizers are float32 in any case."""
    micro_batches: int = 1
    """Number of micro-batches that a rank's batch is computed in, one after the other."""
    step: int = 0
    """Steps taken so far; with the seed, the whole random state of a run."""

    @property
    def images_seen(self) -> int:
        """Samples seen so far, over all ranks."""
        return self.step * self.config.batch_size

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(self.generator_side.parameters()).device

    @property
    def encoder_generator(self) -> EncoderGenerator:
        """E and G without their DDP wrapper."""
        return cast(EncoderGenerator, _unwrapped(self.generator_side))

    @property
    def discriminators(self) -> Discriminators:
        """D and D' without their DDP wrapper."""
        return cast(Discriminators, _unwrapped(self.discriminator_side))


def _unwrapped(network: nn.Module) -> nn.Module:
    """Return a network without its DDP wrapper."""
    return getattr(network, "module", network)


def create_state(
    config: Config,
    device: torch.device | str = "cpu",
    precision: torch.dtype = torch.float32,
) -> State:
    """Return the state before the first step: seeded networks and fresh optimizers.

    ``precision`` is what they compute in: ``torch.bfloat16`` where the device has units for it.
    """
    generator_side = EncoderGenerator(config.model)
    discriminator_side = Discriminators(config.model)
    initialise(generator_side.encoder, order.weights_seed(config.seed, 0))
    initialise(generator_side.generator, order.weights_seed(config.seed, 1))
    initialise(discriminator_side, order.weights_seed(config.seed, 2))
    for network in (generator_side, discriminator_side):
        if not config.is_points:
            # The fastest layout for convolutions on CPUs and GPUs; values do not change.
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        network.to(device)
    return State(
        config=config,
        generator_side=generator_side,
        discriminator_side=discriminator_side,
        optimizer_g=Optimizer(generator_side, config.optim.lr_g, config),
        optimizer_d=Optimizer(discriminator_side, config.optim.lr_d, config),
        average=deepcopy(generator_side).requires_grad_(False) if config.optim.ema else None,
        annealing=torch.ones((), device=device),
        precision=precision,
    )


def distribute(state: State) -> None:
    """Wrap the networks for data-parallel training, where there is more than one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    ids = [state.device.index] if state.device.type == "cuda" else None
    for name in ("generator_side", "discriminator_side"):
        wrapped = DistributedDataParallel(getattr(state, name), device_ids=ids)
        # Each rank keeps its own batch norm statistics. Set afterwards: the constructor's argument
        # changed its name between torch 2.11 and 2.13.
        wrapped.broadcast_buffers = False
        setattr(state, name, wrapped)


def update(state: State, x: Tensor, draws: order.Draws) -> dict[str, Tensor]:
    """Compute one step on the device; ``speed/graph.py`` captures it."""
    t = state.config.transform
    x_encoder = transform(x, draws.encoder, t) if t.encoder else None
    if t.condition:
        x = transform(x, draws.condition, t)
    tx = transform(x, draws.transform, t)
    columns = (x, tx, x if x_encoder is None else x_encoder, *draws[:3])
    batches = [
        MicroBatch(*tensors)
        for tensors in zip(*(c.chunk(state.micro_batches) for c in columns), strict=True)
    ]
    scalars, generated = _update_discriminators(state, batches)
    for losses, more in zip(scalars, _update_generators(state, batches, generated), strict=True):
        losses |= more
    _update_average(state)
    return {k: torch.stack([s[k].detach() for s in scalars]).mean(0) for k in scalars[0]}


Update = Callable[[State, Tensor, order.Draws], dict[str, Tensor]]


def train_step(
    state: State, x: Tensor, draws: order.Draws, compute: Update = update
) -> dict[str, Tensor]:
    """Update D and D', then E and G, on one batch; return its losses and logits as scalars.

    Args:
        state: changed in place.
        x: this rank's real samples, on the state's device.
        draws: the random numbers that belong to them, on the same device.
        compute: ``update``, or a captured one.
    """
    for optimizer in (state.optimizer_g, state.optimizer_d):
        optimizer.schedule(state.step)
    state.annealing.fill_(annealing(state.config, state.step))
    scalars = compute(state, x, draws)
    state.step += 1
    return scalars


class MicroBatch(NamedTuple):
    """What one forward and backward pass computes on."""

    x: Tensor
    tx: Tensor
    x_encoder: Tensor
    """What E sees: x, or a transformation of it (``transform.encoder``)."""
    noise: Tensor
    z_prior: Tensor
    noise_prior: Tensor


def _update_discriminators(
    state: State, batches: list[MicroBatch]
) -> tuple[list[dict[str, Tensor]], list[Generated]]:
    """Update D and D' to tell T(x) from x_hat and x from x_prior; return scalars and fakes.

    With one micro-batch, G's autograd graph serves the generators' phase too: only D changes.
    """
    weight, whole = state.config.objective.prior_weight, len(batches) == 1
    scalars, generated = [], []
    state.optimizer_d.zero_grad()
    for i, batch in enumerate(batches):
        with torch.set_grad_enabled(whole):
            fake = _generate(state, batch)
        generated += [fake] if whole else []
        with _synchronised(state.discriminator_side, i == len(batches) - 1):
            (loss_D, loss_D_prime, penalty), logits = _discriminator_losses(state, batch, fake)
            ((loss_D + weight * loss_D_prime + penalty) / len(batches)).backward()
        scalars.append(
            {
                "loss/D": loss_D,
                "loss/D_prime": loss_D_prime,
                "logit/D_real": cast(Tensor, logits.pair_real).mean(),
                "logit/D_fake": logits.pair_fake.mean(),
                "logit/D_prime_real": cast(Tensor, logits.sample_real).mean(),
                "logit/D_prime_fake": logits.sample_fake.mean(),
            }
        )
    state.optimizer_d.step()
    return scalars, generated


def _discriminator_losses(
    state: State, batch: MicroBatch, fake: Generated
) -> tuple[tuple[Tensor, Tensor, Tensor], Logits]:
    """Return the losses of D and of D', their gradient penalties, and the logits."""
    objective = state.config.objective
    images = (batch.x, batch.tx, fake.x_hat.detach(), fake.x_prior.detach())
    if objective.r1 or objective.r2:
        images = tuple(image.detach().requires_grad_() for image in images)
    logits = _logits(state, images, mismatched=bool(objective.mismatched))
    real_pairs, real_samples = cast(Tensor, logits.pair_real), cast(Tensor, logits.sample_real)
    loss_D = discriminator_loss(real_pairs, logits.pair_fake, objective.loss)
    if logits.pair_mismatched is not None:
        mismatched = discriminator_loss(real_pairs, logits.pair_mismatched, objective.loss)
        loss_D = loss_D + objective.mismatched * mismatched
    loss_D_prime = discriminator_loss(real_samples, logits.sample_fake, objective.loss)
    penalty = torch.zeros_like(loss_D)
    if objective.r1:
        # Both heads see x: with one sign, the gradient of D could cancel that of D'.
        signs = 1 - 2 * (torch.arange(len(real_pairs), device=state.device) % 2)
        real = signs * real_pairs + real_samples
        penalty = penalty + objective.r1 * gradient_penalty(real, images[:2])
    if objective.r2:
        generated = logits.pair_fake + logits.sample_fake
        penalty = penalty + objective.r2 * gradient_penalty(generated, images[2:])
    return (loss_D, loss_D_prime, state.annealing * penalty), logits


def _update_generators(
    state: State, batches: list[MicroBatch], generated: list[Generated]
) -> list[dict[str, Tensor]]:
    """Update E and G to fool D and D', which are frozen; return the scalars."""
    objective = state.config.objective
    scalars = []
    state.discriminators.requires_grad_(False)
    state.optimizer_g.zero_grad()
    for i, batch in enumerate(batches):
        with _synchronised(state.generator_side, i == len(batches) - 1):
            fake = generated[i] if generated else _generate(state, batch)
            images = (batch.x, batch.tx, fake.x_hat, fake.x_prior)
            logits = _logits(state, images, frozen=True, real=objective.loss == "relativistic")
            loss_pair = generator_loss(logits.pair_real, logits.pair_fake, objective.loss)
            loss_prior = generator_loss(logits.sample_real, logits.sample_fake, objective.loss)
            losses = {"loss/GE_pair": loss_pair, "loss/GE_prior": loss_prior}
            loss = loss_pair + objective.prior_weight * loss_prior
            if fake.z_second is not None:
                z, z_second = fake.z.float(), fake.z_second.float()
                if objective.invariance:
                    losses["loss/invariance"] = _invariance(z, z_second)
                    loss = loss + objective.invariance * losses["loss/invariance"]
                if objective.alignment:
                    losses["loss/alignment"] = (z - z_second).square().sum(1).mean()
                    loss = loss + objective.alignment * losses["loss/alignment"]
            if fake.z_again is not None:
                losses["loss/latent"] = (fake.z_again.float() - batch.z_prior).square().mean()
                loss = loss + state.annealing * objective.latent * losses["loss/latent"]
            (loss / len(batches)).backward()
        scalars.append(losses)
    state.optimizer_g.step()
    state.discriminators.requires_grad_(True)
    return scalars


def _invariance(z: Tensor, z_second: Tensor) -> Tensor:
    """Return the invariance loss against the codes of all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return invariance_loss(z, z_second)
    others = torch.cat(all_gather(z_second))
    return invariance_loss(z, others, first=dist.get_rank() * len(z))


def _generate(state: State, batch: MicroBatch) -> Generated:
    """Return x_hat, x_prior and the codes."""
    objective = state.config.objective
    second = batch.tx if objective.invariance or objective.alignment else None
    with _autocast(state):
        return state.generator_side(*batch[2:], second, again=bool(objective.latent))


def _synchronised(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Average the ranks' gradients in the backward pass of the last micro-batch alone."""
    wrapped = isinstance(network, DistributedDataParallel)
    return network.no_sync() if wrapped and not last else nullcontext()


def _logits(
    state: State,
    images: tuple[Tensor, ...],
    *,
    frozen: bool = False,
    real: bool = True,
    mismatched: bool = False,
) -> Logits:
    """Return the logits in float32; a frozen D has no gradients to synchronise, so no DDP."""
    network = state.discriminators if frozen else state.discriminator_side
    with _autocast(state):
        logits: Logits = network(*images, real=real, mismatched=mismatched)
    if state.precision == torch.float32:
        return logits
    return Logits(*(cast(Tensor, None if v is None else v.float()) for v in logits))


def _autocast(state: State) -> AbstractContextManager[object]:
    device, half = state.device.type, state.precision != torch.float32
    # A captured step must cast its weights anew at every replay.
    cache = device != "cuda"
    return torch.autocast(device, state.precision, cache_enabled=cache) if half else nullcontext()


@torch.no_grad()
def _update_average(state: State) -> None:
    """Move the averaged E and G towards the present ones; buffers are copied."""
    if state.average is None:
        return
    decay = state.config.optim.ema ** (state.config.batch_size / 1000)
    present = state.encoder_generator
    move = get_ema_multi_avg_fn(decay)
    move(list(state.average.parameters()), list(present.parameters()), torch.zeros(()))
    for ours, theirs in zip(state.average.buffers(), present.buffers(), strict=True):
        ours.copy_(theirs)


@dataclass(frozen=True)
class Progress:
    """Position of a run, with the means since the last progress, over all ranks."""

    step: int
    images_seen: int
    metrics: dict[str, float]


def train(
    state: State,
    batches: Iterator[tuple[Tensor, order.Draws]],
    every_images: int,
    compute: Update = update,
) -> Iterator[Progress]:
    """Train to ``config.total_steps``, yielding progress about every so many images and at the end.

    Losses are summed on the device and read only here, so steps never wait for the host.

    Args:
        state: changed in place; steps already taken are not repeated.
        batches: this rank's samples and draws, from the state's present step on.
        every_images: images between two yields, rounded up to whole steps.
        compute: ``update``, or a captured one (``speed.graph.fastest_update``).

    Raises:
        NonFiniteLossError: training has diverged; the weights are those before the step that did.
    """
    every = max(1, math.ceil(every_images / state.config.batch_size))
    state.generator_side.train()
    state.discriminator_side.train()
    sums, count = dict[str, Tensor](), 0
    while state.step < state.config.total_steps:
        x, draws = next(batches)
        scalars = train_step(state, x, draws, compute)
        sums = {name: value + sums.get(name, 0) for name, value in scalars.items()}
        count += 1
        if state.step % every == 0 or state.step == state.config.total_steps:
            yield Progress(state.step, state.images_seen, _means(state, sums, count))
            sums, count = {}, 0


def _means(state: State, sums: dict[str, Tensor], count: int) -> dict[str, float]:
    """Return the mean of every scalar over the steps and the ranks."""
    for networks, optimizer in (("D and D'", state.optimizer_d), ("E and G", state.optimizer_g)):
        if failed := optimizer.first_skipped_step():
            raise NonFiniteLossError(
                f"The gradient of {networks} became infinite or not a number in step {failed:,}; "
                f"{_REMEDY}."
            )
    values = torch.stack(list(sums.values())) / count
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    means = dict(zip(sums, values.tolist(), strict=True))
    for name, value in means.items():
        if not math.isfinite(value):
            raise NonFiniteLossError(f"{name} is {value}; {_REMEDY}.")
    return means
