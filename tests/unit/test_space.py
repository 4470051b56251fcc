"""What a sweep searches: how it is written, and what is drawn from it."""

import numpy as np
import pytest

from ivegan.config import PRESETS, flatten, override, preset
from ivegan.errors import UserError
from pipelines.sweeps import space
from pipelines.sweeps.space import Choice, Range


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_space_of_rates_and_latent_sizes_that_it_can_take(name):
    config = preset(name)
    found = space.space_of(config)
    assert {"optim.lr_g", "optim.lr_d", "model.z_dim", "model.noise_dim"} == set(found)
    for changes in space.draw(found, 20, seed=0, grid=False):
        assert flatten(override(config, changes)) == flatten(config) | changes


def test_the_command_line_adds_replaces_and_leaves_out():
    found = space.space_of(
        preset("digits"), "model.z_dim=4..6 optim.lr_d= seed=0,1 transform.flip=True,False"
    )
    assert found == {
        "optim.lr_g": Range(1e-4, 2e-3, whole=False),
        "model.noise_dim": Choice((2, 4, 8)),
        "model.z_dim": Range(4, 6, whole=True),
        "seed": Choice((0, 1)),
        "transform.flip": Choice((True, False)),
    }
    assert space.spelled(found)["optim.lr_g"] == "0.0001..0.002"
    assert space.spelled(found)["model.z_dim"] == "4..6"
    told = " ".join(f"{name}={text}" for name, text in space.spelled(found).items())
    assert space.space_of(preset("digits"), f"optim.lr_d= {told}") == found


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim.lr=1e-4..1e-3", "There is no setting 'optim.lr'"),
        ("optim.lr_g", "has no values"),
        ("optim.lr_g=1e-3..1e-4", "is no range: write LOW..HIGH, both greater than 0"),
        ("objective.r1=0..1", "is no range"),
        ("model.z_dim=2,many", "model.z_dim takes int values, not '2,many'"),
        ("model.z_dim=0,2", r"model\.z_dim is 0, but must be at least 1"),
        ("optim.lr_g= optim.lr_d= model.z_dim= model.noise_dim=", "leaves nothing to search"),
    ],
)
def test_a_mistake_in_a_space_is_one_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence):
        space.space_of(preset("ring"), text)


def test_what_decides_is_quality_unless_told_otherwise_and_knows_its_direction():
    ring, mnist = preset("ring"), preset("mnist")
    assert space.objective_of(ring) == space.Objective("valid/quality", "max")
    for score in ("valid/frechet", "frechet"):
        assert space.objective_of(mnist, score) == space.Objective("valid/frechet", "min")
    with pytest.raises(UserError, match=r"valid/frechet is not known for ring; .*valid/right_mode"):
        space.objective_of(ring, "valid/frechet")
    most, least = space.objective_of(mnist), space.objective_of(mnist, "frechet")
    assert sorted([0.1, most.worst, 0.9], key=most.rank) == [0.9, 0.1, most.worst]
    assert sorted([0.1, least.worst, 0.9], key=least.rank) == [0.1, 0.9, least.worst]
    assert most.rank(None) == least.rank(None) == float("inf")


def test_a_grid_has_every_combination_and_draws_ranges_anew():
    found = space.space_of(preset("mnist"), "model.noise_dim=4,8")
    trials = space.draw(found, 2, seed=0, grid=True)
    pairs = [(t["model.z_dim"], t["model.noise_dim"]) for t in trials]
    assert sorted(pairs) == sorted(2 * [(z, n) for z in (2, 3, 8, 16, 32) for n in (4, 8)])
    assert len({t["optim.lr_g"] for t in trials}) == len(trials)


def test_a_trial_depends_on_its_place_alone():
    found = space.space_of(preset("ring"))
    few, more = (space.draw(found, count, seed=3, grid=False) for count in (5, 50))
    assert more[:5] == few
    assert space.draw(found, 5, seed=4, grid=False) != few


def test_rates_are_drawn_evenly_on_a_logarithmic_scale_and_numbers_within_both_ends():
    random = np.random.default_rng(0)
    rates = [Range(1e-4, 1e-2, whole=False).draw(random) for _ in range(4000)]
    assert 1e-4 <= min(rates) < 1.1e-4
    assert 9e-3 < max(rates) <= 1e-2
    assert np.mean(np.array(rates) < 1e-3) == pytest.approx(0.5, abs=0.03)
    sizes = {Range(2, 4, whole=True).draw(random) for _ in range(100)}
    assert sizes == {2, 3, 4}
