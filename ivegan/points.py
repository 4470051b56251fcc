"""The updates of a step on points, with the gradients written out by hand.

On networks of a few inputs and 128 hidden units a step is bound by memory and by the number of its
operations, and autograd has most of the latter. All four networks are dense, tanh, dense:

    h = tanh(x1 @ w)       x1: the inputs and a column of ones; w: weights and bias, transposed
    y = v @ h^T + b        (outputs, n), in which layout thin products are fast

E and G end in another tanh. All tensors may have a dimension in front, for several games at once
(``seeds.py``).
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import softplus

from ivegan.order import Draws

if TYPE_CHECKING:
    from ivegan.step import State

_tanh_backward = torch.ops.aten.tanh_backward.grad_input


def possible(state: "State") -> bool:
    """Return whether ``update`` may be used.

    It knows no gradients of gradients, no losses of pairs of logits, and a batch only as a whole.
    """
    config, objective = state.config, state.config.objective
    simple = objective.loss != "relativistic" and not (objective.r1 or objective.r2)
    whole = state.precision == torch.float32 and state.parts == 1
    return config.is_points and simple and whole


@torch.no_grad()
def update(state: "State", x: Tensor, tx: Tensor, draws: Draws) -> dict[str, Tensor]:
    """Update D and D', then E and G, on one batch; return ``train_step``'s scalars.

    Args:
        state: its networks and optimizers are changed in place.
        x: this rank's real samples, (n, 2).
        tx: T(x).
        draws: the random numbers that go with them.
    """
    objective, n = state.config.objective, x.shape[-2]
    players, judges = state.encoder_generator, state.discriminators
    E, G = _Mlp(players.encoder.body), _Mlp(cast(nn.Sequential, players.generator.body[0]))
    D, D_prime = _Mlp(judges.pair_head), _Mlp(judges.sample_head)

    z = E.forward(x).tanh_()
    noise = torch.cat((draws.noise, draws.noise_prior), -2)
    y = G.forward(noise, torch.cat((z.mT, draws.z_prior), -2)).tanh_()
    x_hat, x_prior = y[..., :n].mT, y[..., n:].mT

    # D and D', one after the other: the second uses memory that the first has in the cache. What
    # G made stands first in their inputs, because the second phase may look at nothing else.
    candidates = [x_hat, tx]
    if objective.mismatched:
        candidates.append(tx.unflatten(-2, (-1, 2)).flip(-2).flatten(-3, -2))
    pairs = D.forward(torch.cat([x] * len(candidates), -2), torch.cat(candidates, -2))
    told = [(1, 1), (-1, 1 + objective.mismatched), (1, objective.mismatched)]
    loss_D, by_pairs = _loss(pairs, n, *told[: len(candidates)])
    D.backward(by_pairs)
    singles = D_prime.forward(torch.cat((x_prior, x), -2))
    loss_D_prime, by_singles = _loss(singles, n, (1, 1), (-1, 1))
    D_prime.backward(by_singles.mul_(objective.prior_weight))
    _average(judges)
    state.optimizer_d.step()

    # E and G. The weights of D and D' have changed, what they are shown has not.
    fooled = (1, -1) if objective.loss == "minimax" else (-1, 1)
    loss_G, by_pairs = _loss(D.again(n), n, fooled)
    by_x_hat = D.backward(by_pairs, weights=False, inputs=slice(2, 4))
    loss_G_prior, by_singles = _loss(D_prime.again(n), n, fooled)
    by_singles.mul_(objective.prior_weight)
    by_x_prior = D_prime.backward(by_singles, weights=False, inputs=slice(0, 2))
    by_y = torch.cat((by_x_hat, by_x_prior), -1)
    by_z = G.backward(_tanh_backward(by_y, y, grad_input=by_y), inputs=slice(noise.shape[-1], None))
    by_z = by_z[..., :n].contiguous()
    E.backward(_tanh_backward(by_z, z, grad_input=by_z))
    _average(players)
    state.optimizer_g.step()

    D_fake, D_real, *_ = _means(pairs, n)
    D_prime_fake, D_prime_real = _means(singles, n)
    return {
        "loss/D": loss_D,
        "loss/D_prime": loss_D_prime,
        "logit/D_real": D_real,
        "logit/D_fake": D_fake,
        "logit/D_prime_real": D_prime_real,
        "logit/D_prime_fake": D_prime_fake,
        "loss/GE_pair": loss_G,
        "loss/GE_prior": loss_G_prior,
    }


class _Mlp:
    """A network of points on one batch: what it was given, and what its hidden units said."""

    def __init__(self, layers: nn.Sequential) -> None:
        self.first, self.second = cast(nn.Linear, layers[0]), cast(nn.Linear, layers[2])

    def forward(self, *columns: Tensor) -> Tensor:
        """Return the outputs, (outputs, n), of inputs whose columns stand in several tensors."""
        ones = columns[0].new_ones(()).expand(*columns[0].shape[:-1], 1)
        self.x1 = torch.cat((*columns, ones), -1)
        return self.again(self.x1.shape[-2])

    def again(self, n: int) -> Tensor:
        """Return what the weights, as they are now, make of the first n of the same inputs."""
        w = torch.cat((self.first.weight.mT, self.first.bias.unsqueeze(-2)), -2)
        self.h = _tanh_(self.x1[..., :n, :] @ w)
        return (self.second.weight @ self.h.mT).add_(self.second.bias.unsqueeze(-1))

    def backward(self, by_y: Tensor, *, weights: bool = True, inputs: slice = slice(0)) -> Tensor:
        """Set the gradients of the weights; return those of some inputs, (inputs, n).

        The gradient by a hidden unit is the sum over outputs o of by_y[o] v[o] (1 - h^2). What
        depends on the sample or on the unit alone is multiplied to the small side of a product, so
        that nothing else of the size of h is ever computed, and that in the place of h.

        Args:
            by_y: the gradient by the outputs of the first n samples, (outputs, n).
            weights: whether to set theirs; n is all samples then.
            inputs: the columns of those to return.
        """
        h, v = self.h[..., : by_y.shape[-1], :], self.second.weight
        if weights:
            self.second.weight.grad = by_y @ h
            self.second.bias.grad = by_y.sum(-1)
        slopes = _tanh_backward(h.new_ones(()).expand_as(h), h, grad_input=h)
        if weights:
            x1 = (by_y.mT.contiguous().unsqueeze(-1) * self.x1.unsqueeze(-2)).flatten(-2)
            by_w = (x1.mT @ slopes).unflatten(-2, (v.shape[-2], -1))
            by_w = (by_w * v.unsqueeze(-2)).sum(-3)
            self.first.weight.grad = by_w[..., :-1, :].mT.contiguous()
            self.first.bias.grad = by_w[..., -1, :].contiguous()
        w = v.unsqueeze(-2) * self.first.weight[..., inputs].mT.unsqueeze(-3)
        by_inputs = (w.flatten(-3, -2) @ slopes.mT).unflatten(-2, w.shape[-3:-1])
        return (by_inputs * by_y.unsqueeze(-2)).sum(-3)


def _loss(logits: Tensor, n: int, *terms: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return a loss of logits (1, k n), and its gradient.

    All losses but the relativistic one are sums of weight * mean softplus(sign * logits), with a
    sign and a weight for every n logits; softplus has the derivative sigmoid.
    """
    signs, weights, factors = _constants(terms, n, logits.dtype, logits.device)
    signed = logits.unflatten(-1, (-1, n)) * signs
    loss = (softplus(signed).mean(-1) * weights).sum((-2, -1))
    return loss, signed.sigmoid_().mul_(factors).flatten(-2)


@cache
def _constants(
    terms: tuple[tuple[float, float], ...], n: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return signs, weights, and what a sigmoid is multiplied by."""
    signs, weights = torch.tensor(terms, dtype=dtype, device=device).T.unsqueeze(-1)
    return signs, weights[:, 0], signs * weights / n


def _means(logits: Tensor, n: int) -> tuple[Tensor, ...]:
    """Return the mean of every n logits of (1, k n)."""
    return logits.squeeze(-2).unflatten(-1, (-1, n)).mean(-1).unbind(-1)


def _average(network: nn.Module) -> None:
    """Give every rank the mean of the ranks' gradients."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for ours, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        ours.copy_(mean.view_as(ours))


def _tanh_(x: Tensor) -> Tensor:
    """Return tanh(x) in the place of x.

    2 sigmoid(2x) - 1, to 1e-7, where MKL's own tanh takes several times as long.
    """
    slow = x.device.type == "cpu" and _is_amd()
    return x.mul_(2).sigmoid_().mul_(2).sub_(1) if slow else x.tanh_()


@cache
def _is_amd() -> bool:
    found = Path("/proc/cpuinfo")
    return found.exists() and "AuthenticAMD" in found.read_text()
