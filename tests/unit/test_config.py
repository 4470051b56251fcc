"""One dotted vocabulary names every setting, from the flag to the checkpoint."""

import json

import pytest

from ivegan import config as c
from ivegan.errors import UserError


@pytest.mark.parametrize("name", list(c.PRESETS))
def test_a_configuration_survives_json(name):
    config = c.preset(name)
    assert c.from_dict(json.loads(json.dumps(c.to_dict(config)))) == config


def test_a_configuration_without_a_protocol_gives_the_shift_of_points_in_data_units():
    values = c.to_dict(c.preset("grid"))
    del values["protocol"]
    values["transform"]["noise_std"] = 0.01 / 2**0.5
    read = c.from_dict(values)
    assert read.protocol == "pacgan"
    assert read.transform.noise_std == pytest.approx(2**-0.5)
    assert values["transform"]["noise_std"] == 0.01 / 2**0.5


def test_override_replaces_dotted_fields_and_nothing_else():
    base = c.preset("mnist")
    new = c.override(base, {"optim.lr_g": 1e-3, "model.z_dim": 3, "seed": 4})
    changed = {k: v for k, v in c.flatten(new).items() if c.flatten(base)[k] != v}
    assert changed == {"optim.lr_g": 1e-3, "model.z_dim": 3, "seed": 4}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.lr", 1),
        ("model", 1),
        ("seed.x", 1),
        ("batch_size", 0),
        ("model.z_dim", 10**20),
        ("transform.shift", -1.0),
    ],
)
def test_an_unknown_setting_and_a_value_out_of_range_are_named(name, value):
    with pytest.raises(UserError, match=name):
        c.override(c.preset("mnist"), {name: value})


def test_an_unknown_preset_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match="mnist"):
        c.preset("mnits")


def test_the_paper_presets_are_tables_1_to_3():
    ring, mnist, celeba = (c.preset(n) for n in ("ring", "mnist", "celeba"))
    assert [p.batch_size for p in (ring, mnist, celeba)] == [1024, 512, 64]
    assert [p.optim.beta1 for p in (ring, mnist, celeba)] == [0.7, 0.7, 0.5]
    assert {p.optim.lr_g for p in (ring, mnist, celeba)} == {2e-4}
    assert {p.optim.lr_d for p in (ring, mnist, celeba)} == {1e-4}
    assert [p.model.noise_dim for p in (ring, mnist, celeba)] == [4, 4, 16]
    assert [p.model.z_dim for p in (ring, mnist, celeba)] == [2, 16, 1024]
    assert ring.total_steps == 50_000
    assert (mnist.transform.shift, mnist.transform.rotate) == (4, 20)
    assert (celeba.transform.shift, celeba.transform.rotate) == (20, 20)
