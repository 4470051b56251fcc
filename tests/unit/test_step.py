"""One step does what Eq. 3 says to whom it says it, and the loop repeats exactly."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import in_ranks

from ivegan import order
from ivegan import step as steps
from ivegan.config import Config, override, preset
from ivegan.layers import fast as layers
from ivegan.networks import Generated, sample_shape
from ivegan.optimizer import annealing
from ivegan.step import (
    MicroBatch,
    NonFiniteLossError,
    State,
    create_state,
    distribute,
    train,
    train_step,
)


def tiny(name: str, **changes) -> Config:
    base = {"batch_size": 16, "total_images": 16 * 4}
    if name != "ring":
        base |= {"model.width": 0.125}
    return override(preset(name), base | {k.replace("__", "."): v for k, v in changes.items()})


def batches(config: Config, step: int = 0, rank: int = 0, world: int = 1):
    """Yield real-looking samples and their draws, as ``data.batches`` does."""
    while True:
        if config.is_points:
            x = order.points(config, step, rank, world)
        else:
            generator = torch.Generator().manual_seed(step)
            whole = torch.rand(config.batch_size, *sample_shape(config.model), generator=generator)
            x = whole.chunk(world)[rank]
        yield x, order.draw(config, step, rank, world)
        step += 1


def tensors(state: State) -> list[torch.Tensor]:
    networks = (state.encoder_generator, state.discriminators)
    return [p.detach() for network in networks for p in network.parameters()]


def weights(state: State) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors(state)])


def test_the_penalty_on_x_is_that_of_d_and_of_d_prime():
    """With one sign for both, the gradient of D could cancel that of D'."""
    config = tiny("ring-plus", objective__r2=0.0)
    state, draws = create_state(config), torch.Generator().manual_seed(0)
    x, tx, x_hat, x_prior = torch.rand(4, 8, 2, generator=draws).repeat_interleave(2, dim=1)
    none = torch.empty(0)
    batch = MicroBatch(x, tx, x, none, none, none)
    fake = Generated(x_hat, x_prior, none, None, None)
    (_, _, penalty), _ = steps._discriminator_losses(state, batch, fake)
    leaves = x.clone().requires_grad_(), tx.clone().requires_grad_()
    logits = state.discriminators(*leaves, x_hat, x_prior, real=True, mismatched=False)
    gradients = torch.autograd.grad(logits.pair_real.sum(), leaves, retain_graph=True)
    gradients += torch.autograd.grad(logits.sample_real.sum(), leaves[0])
    each = sum(gradient.square().sum(1).mean() for gradient in gradients)
    torch.testing.assert_close(penalty, config.objective.r1 / 2 * each)


@pytest.mark.parametrize("name", ["ring", "mnist"])
def test_steps_are_equation_3_written_out_plainly(name):
    """In float64, eight steps give the gradients and weights of a loop with a forward per use."""
    from torch.nn.functional import logsigmoid

    from ivegan.transforms import transform

    changes: dict = {"model__norm": "none", "objective__mismatched": 0.0, "optim__ema": 0.0}
    config = tiny(name, transform__condition=False, **changes)
    state, plain = create_state(config), create_state(config)
    for networks in (state, plain):
        networks.generator_side.double()
        networks.discriminator_side.double()
    for network in (plain.generator_side, plain.discriminator_side):
        layers.plain(network)
    E, G = plain.encoder_generator.encoder, plain.encoder_generator.generator
    discriminators = plain.discriminators

    def pair(candidate, x):
        return discriminators.pair(discriminators.trunk(candidate), discriminators.trunk(x))

    def sample(candidate):
        return discriminators.sample(discriminators.trunk(candidate))

    def same(ours, theirs):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)

    for x, draws in itertools.islice(batches(config), 8):
        x, draws = x.double(), order.Draws(*(d.double() for d in draws))
        train_step(state, x, draws)

        tx = transform(x, draws.transform, config.transform)
        x_hat = G(draws.noise, E(x))
        x_prior = G(draws.noise_prior, draws.z_prior)
        value = (
            logsigmoid(pair(tx, x)).mean()
            + logsigmoid(sample(x)).mean()
            + logsigmoid(-pair(x_hat, x)).mean()
            + logsigmoid(-sample(x_prior)).mean()
        )
        plain.optimizer_d.zero_grad()
        (-value).backward()
        same(state.discriminators, discriminators)
        plain.optimizer_d.step()
        plain.optimizer_g.zero_grad()
        x_hat = G(draws.noise, E(x))
        x_prior = G(draws.noise_prior, draws.z_prior)
        (-logsigmoid(pair(x_hat, x)).mean() - logsigmoid(sample(x_prior)).mean()).backward()
        same(state.encoder_generator, plain.encoder_generator)
        plain.optimizer_g.step()
    # Adam multiplies a rounding of 1e-16 in a gradient of about zero by up to lr / eps = 5e4.
    torch.testing.assert_close(weights(state), weights(plain), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective__loss": "relativistic", "objective__r1": 0.1, "objective__r2": 0.1},
        {"objective__loss": "minimax"},
        {"objective__mismatched": 1.0},
        {"objective__prior_weight": 0.5},
        {"model__norm": "group"},
        {"transform__condition": True},
        {"transform__encoder": True},
        {"objective__invariance": 0.1},
        {"objective__alignment": 0.1},
        {"objective__latent": 0.1},
        {"model__norm_d": "group"},
        {"model__pair_features": "difference"},
        {"optim__schedule": "cosine"},
    ],
)
def test_every_switch_trains_and_matters(changes):
    off = {"objective__mismatched": 0.0, "transform__condition": False, "model__norm": "none"}
    plain, state = (create_state(tiny("digits", **(off | c))) for c in ({}, changes))
    for s in (plain, state):
        (progress,) = list(train(s, batches(s.config), 10**9))
        assert progress.images_seen == 64
    assert weights(state).isfinite().all()
    assert not torch.equal(weights(state)[:100], weights(plain)[:100])
    fresh = create_state(plain.config)
    assert not any(torch.equal(a, b) for a, b in zip(tensors(plain), tensors(fresh), strict=True))


def test_the_latent_term_teaches_the_encoder_alone():
    anneal: dict = {"objective__anneal": 0.5}
    plain, taught = (create_state(tiny("ring", objective__latent=w, **anneal)) for w in (0.0, 4.0))
    plain.step = taught.step = plain.config.total_steps  # when half of the weight is left
    x, draws = next(batches(plain.config))
    before = copy.deepcopy(plain.encoder_generator)
    x_prior = before.generator(draws.noise_prior, draws.z_prior).detach()
    error = (before.encoder(x_prior) - draws.z_prior).square().mean()
    error.backward()
    train_step(plain, x, draws)
    scalars = train_step(taught, x, draws)
    torch.testing.assert_close(scalars["loss/latent"], error.detach())
    sides = (before, plain.encoder_generator, taught.encoder_generator)
    for of_error, without, with_term in zip(*(s.encoder.parameters() for s in sides), strict=True):
        torch.testing.assert_close(with_term.grad, without.grad + 2 * of_error.grad)
    for _, without, with_term in zip(*(s.generator.parameters() for s in sides), strict=True):
        torch.testing.assert_close(with_term.grad, without.grad, rtol=0, atol=0)


def test_what_is_annealed_falls_geometrically_for_four_fifths_of_the_run():
    config = tiny("ring", objective__anneal=0.01, total_images=16 * 100)
    factors = [annealing(config, step) for step in (0, 20, 40, 80, 100)]
    assert factors == pytest.approx([1, 0.01**0.25, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_bfloat16_computes_nearly_the_same_and_keeps_float32_weights(name):
    # Fresh networks draw nearly equal images, whose small differences a norm would multiply, the
    # roundings of bfloat16 among them.
    config = tiny(name, model__norm="none")
    plain, half = (create_state(config, precision=p) for p in (torch.float32, torch.bfloat16))
    x, draws = next(batches(config))
    one, other = (train_step(state, x, draws) for state in (plain, half))
    for key, value in one.items():
        assert other[key].dtype == torch.float32
        assert other[key] == pytest.approx(float(value), rel=0.05, abs=0.05), key
    assert any(not torch.equal(one[key], other[key]) for key in one)  # it did compute in bfloat16
    assert weights(half).dtype == torch.float32
    assert weights(half).isfinite().all()


def test_the_average_follows_slowly():
    config = tiny("ring", optim__ema=0.5)
    state = create_state(config)
    assert state.average is not None
    old = next(state.average.parameters()).clone()
    train_step(state, *next(batches(config)))
    new, present = next(state.average.parameters()), next(state.encoder_generator.parameters())
    keep = 0.5 ** (16 / 1000)
    torch.testing.assert_close(new, keep * old + (1 - keep) * present)


@pytest.mark.parametrize(("side", "networks"), [("d", "D and D'"), ("g", "E and G")])
def test_a_gradient_that_is_not_finite_leaves_the_weights_and_stops_the_run(side, networks):
    """Adam alone would write it into every weight."""
    config = tiny("digits", total_images=16 * 6, optim__ema=0.0)
    state = create_state(config)
    optimizer = getattr(state, f"optimizer_{side}")
    own = state.discriminators if side == "d" else state.encoder_generator
    before: list[torch.Tensor] = []

    def spoil(opt, args, kwargs):
        if state.step >= 2:
            if not before:
                before.extend(p.detach().clone() for p in own.parameters())
            gradient = next(own.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[0] = float("inf")

    optimizer.register_step_pre_hook(spoil)
    with pytest.raises(NonFiniteLossError, match=rf"gradient of {networks} .* in step 3;"):
        list(train(state, batches(config), 16 * 6))
    for old, new in zip(before, own.parameters(), strict=True):
        assert torch.equal(old, new)


def _diverge_on_rank_1(rank: int, world: int, out: str) -> None:
    config = tiny("ring", total_images=16 * 4)
    state = create_state(config)
    distribute(state)

    def spoiled():
        for step, (x, draws) in enumerate(batches(config, 0, rank, world)):
            yield (x * float("nan") if (rank, step) == (1, 1) else x), draws

    with pytest.raises(NonFiniteLossError, match=r"D and D' .* in step 2;"):
        list(train(state, spoiled(), 16 * 4))
    Path(f"{out}-{rank}").write_text(str(bool(weights(state).isfinite().all())))


def test_all_ranks_stop_where_one_diverges(tmp_path: Path):
    in_ranks(2, _diverge_on_rank_1, str(tmp_path / "finite"))
    assert [(tmp_path / f"finite-{rank}").read_text() for rank in range(2)] == ["True", "True"]


def test_an_optimizer_keeps_its_own_rate_and_kind_when_a_gpus_state_is_loaded():
    """A rate that is no tensor would be a constant of a captured step, and the reverse here."""
    optimizer = create_state(tiny("ring")).optimizer_g
    other = optimizer.state_dict()
    other["param_groups"][0] |= {"lr": torch.tensor(1.0), "capturable": True}
    optimizer.load_state_dict(other)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["capturable"]) == (preset("ring").optim.lr_g, False)
    assert isinstance(group["lr"], float)


def test_the_cosine_schedule_rises_then_falls_and_progress_counts_images():
    config = tiny("ring", optim__schedule="cosine", total_images=16 * 99)
    state, rates, seen = create_state(config), [], []
    for progress in train(state, batches(config), 24):
        seen.append(progress.images_seen)
        rates.append(state.optimizer_g.param_groups[0]["lr"] / config.optim.lr_g)
    assert seen == [*range(32, 16 * 99, 32), 16 * 99]
    assert rates[0] == pytest.approx(0.5, abs=0.01)
    assert rates[1] == pytest.approx(1, abs=0.01)
    assert rates[25] == pytest.approx(0.5, abs=0.02)
    assert rates[49] == pytest.approx(0.02, abs=0.01)
    assert np.all(np.diff(rates[1:]) < 0)


def test_micro_batches_give_the_gradients_of_the_batch():
    """Without batch norm, gradients are means over samples, however they are grouped."""
    config = tiny("digits", model__norm="none", optim__ema=0.0)
    whole, split = create_state(config), create_state(config)
    split.micro_batches = 4
    for state in (whole, split):
        state.generator_side.double()
        state.discriminator_side.double()
    for x, draws in itertools.islice(batches(config), 5):
        x, draws = x.double(), order.Draws(*(part.double() for part in draws))
        one, other = train_step(whole, x, draws), train_step(split, x, draws)
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-6, atol=1e-8)


def _train_rank(rank: int, world: int, config: Config, micro_batches: int, out: str) -> None:
    state = create_state(config)
    state.micro_batches = micro_batches
    distribute(state)
    progress = list(train(state, batches(config, 0, rank, world), 16))
    if rank == 0:
        torch.save({"weights": weights(state), "metrics": progress[-1].metrics}, out)


@pytest.mark.parametrize(
    ("norm", "micro_batches", "invariance"), [("none", 2, 0.0), ("sync", 1, 0.1)]
)
def test_several_ranks_train_like_one(norm, micro_batches, invariance, tmp_path: Path):
    """Gradients are means over the global batch, so only the order of additions differs."""
    changes = {"model__norm": norm, "objective__invariance": invariance}
    config = tiny("digits", total_images=16 * 8, **changes)
    out = str(tmp_path / "rank0.pt")
    in_ranks(2, _train_rank, config, micro_batches, out)
    several = torch.load(out, weights_only=True)
    state = create_state(config)
    progress = list(train(state, batches(config), 16))
    # Adam divides by the root of the second moment, so rounding of a gradient near zero can move a
    # weight by a share of the learning rate; 8 steps of 5e-4 bound the rest.
    torch.testing.assert_close(several["weights"], weights(state), rtol=1e-3, atol=2e-4)
    for key, value in progress[-1].metrics.items():
        assert several["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
