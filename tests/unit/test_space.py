"""The search space of a sweep: its text, Tune's domains, and the drawn trials."""

import numpy as np
import pytest

from ivegan.config import PRESETS, flatten, override, preset
from ivegan.errors import UserError
from pipelines.sweeps import space


@pytest.mark.parametrize("name", PRESETS)
def test_default_space_of_each_preset_is_trainable(name):
    config = preset(name)
    searched = space.space_of(config)
    assert set(searched) == {"optim.lr_g", "optim.lr_d", "model.z_dim", "model.noise_dim"}
    for changes in space.draw(config, searched, 20, seed=0, grid=False):
        assert flatten(override(config, changes)) == flatten(config) | changes


def test_flag_adds_replaces_and_removes_settings():
    config = preset("digits")
    text = "model.z_dim=4..6 optim.lr_d= seed=0,1 transform.flip=True,False"
    searched = space.space_of(config, text)
    assert searched == {
        "optim.lr_g": "0.0001..0.002",
        "model.noise_dim": "2,4,8",
        "model.z_dim": "4..6",
        "seed": "0,1",
        "transform.flip": "True,False",
    }
    trials = space.draw(config, searched, 200, seed=0, grid=False)
    assert {t["model.z_dim"] for t in trials} == {4, 5, 6}  # both ends
    assert {t["transform.flip"] for t in trials} == {True, False}
    assert space.draw(config, searched, 5, seed=0, grid=False) == trials[:5]
    assert space.draw(config, searched, 5, seed=1, grid=False) != trials[:5]
    rates = np.array([t["optim.lr_g"] for t in trials])
    assert 1e-4 <= rates.min() < rates.max() <= 2e-3
    assert np.median(np.log10(rates)) == pytest.approx(np.log10(2e-7) / 2, abs=0.15)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("optim.lr=1e-4..1e-3", "There is no setting 'optim.lr'"),
        ("optim.lr_g", "has no values"),
        ("optim.lr_g=1e-3..1e-4", "is no range: write LOW..HIGH, both greater than 0"),
        ("objective.r1=0..1", "is no range"),
        ("transform.flip=True..False", "is no range"),
        ("model.z_dim=2,many", "model.z_dim takes values of type int, not 'many'"),
        ("transform.flip=yes,no", "transform.flip takes values of type bool, not 'yes'"),
        ("model.z_dim=0,2", r"model\.z_dim is 0, but must be from 1 to 65,536"),
        ("optim.lr_g= optim.lr_d= model.z_dim= model.noise_dim=", "leaves nothing to search"),
    ],
)
def test_mistake_in_a_space_raises_a_sentence(text, sentence):
    with pytest.raises(UserError, match=sentence):
        space.space_of(preset("ring"), text)


def test_objective_is_quality_by_default_and_has_a_direction():
    ring, mnist = preset("ring"), preset("mnist")
    assert space.objective_of(ring) == space.SearchObjective("valid/quality", "max")
    for score in ("valid/frechet", "frechet"):
        assert space.objective_of(mnist, score) == space.SearchObjective("valid/frechet", "min")
    with pytest.raises(UserError, match=r"valid/frechet is not known for ring; .*valid/right_mode"):
        space.objective_of(ring, "valid/frechet")
    most, least = space.objective_of(mnist), space.objective_of(mnist, "frechet")
    assert sorted([0.1, most.worst, 0.9], key=most.rank) == [0.9, 0.1, most.worst]
    assert sorted([0.1, least.worst, 0.9], key=least.rank) == [0.1, 0.9, least.worst]
    assert most.rank(None) == least.rank(None) == float("inf")


def test_grid_has_each_combination_and_draws_ranges_anew():
    config = preset("mnist")
    searched = space.space_of(config, "model.noise_dim=4,8")
    trials = space.draw(config, searched, 2, seed=0, grid=True)
    pairs = [(t["model.z_dim"], t["model.noise_dim"]) for t in trials]
    assert sorted(pairs) == sorted(2 * [(z, n) for z in (2, 3, 8, 16, 32) for n in (4, 8)])
    assert len({t["optim.lr_g"] for t in trials}) == len(trials)
