"""Every command answers a mistake with one sentence, and --json with one object."""

import json
import logging
from dataclasses import dataclass
from typing import Any

import pytest

from ivegan.config import PRESETS
from ivegan.errors import UserError
from pipelines import options as cli


@dataclass(frozen=True, kw_only=True)
class Bake(cli.Options):
    """Bake a cake."""

    cake: str
    """Which cake."""
    oven_heat: int = 180
    """Degrees."""


@dataclass(frozen=True, kw_only=True)
class Run(cli.Options):
    """Train one model."""

    data: str | None = None
    """Where the data are."""
    workers: int = 2
    """How many."""
    gpu: bool = False
    """With GPUs."""
    run_id: str | None = None
    """Name of the run."""


def bake(options: Bake) -> dict[str, Any]:
    print(f"baking {options.cake}")
    if options.cake == "stone":
        raise UserError("A stone cannot be baked:\n  choose a cake.")
    return {"cake": options.cake, "heat": options.oven_heat, "taste": float("nan")}


def train(name: str, config: Any, run: Run) -> dict[str, Any]:
    return {"name": name, "lr_g": config.optim.lr_g, "workers": run.workers, "gpu": run.gpu}


@pytest.fixture(autouse=True)
def _logging(monkeypatch):
    """Keep ``run`` from giving the whole test session a log handler."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


def exit_of(capsys, function, *arguments, **more):
    """Return exit status, stdout and stderr of something that ends the process."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments, **more)
    said = capsys.readouterr()
    return stop.value.code, said.out, said.err


def preset(*argv: str):
    return cli.parse_preset(argv, PRESETS, Run, default="digits", prog="train.py")


def test_the_last_line_of_stdout_is_one_json_object(capsys):
    code, out, err = exit_of(capsys, cli.run, bake, Bake, argv=["tart", "--json"])
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "baking tart"
    assert json.loads(out.splitlines()[-1]) == {"cake": "tart", "heat": 180, "taste": None}


def test_without_json_only_people_are_spoken_to(capsys):
    assert exit_of(capsys, cli.run, bake, Bake, argv=["tart"]) == (0, "baking tart\n", "")


def test_a_users_mistake_is_one_line_on_stderr_and_status_2(capsys):
    code, out, err = exit_of(capsys, cli.run, bake, Bake, argv=["stone", "--json"])
    assert (code, out) == (2, "baking stone\n")
    assert err == "A stone cannot be baked: choose a cake.\n"


def test_a_result_can_mean_status_1(capsys):
    more = {"argv": ["tart"], "failed": lambda result: result["heat"] < 200}
    assert exit_of(capsys, cli.run, bake, Bake, **more)[0] == 1


def test_a_mistake_of_ours_keeps_its_traceback():
    def broken(options: Bake) -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        cli.run(broken, Bake, argv=["tart"])


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "bake.py needs CAKE; see bake.py --help."),
        (["a", "b"], "The argument 'b' is not expected there; see bake.py --help."),
        (["a", "--oven-heat"], "--oven-heat needs a value; see bake.py --help."),
        (["a", "--oven-heat", "hot"], "--oven-heat takes a whole number, but got 'hot'."),
        (["a", "--oven_heat=1.5"], "--oven-heat takes a whole number, but got '1.5'."),
        (["a", "--oven-hat", "1"], "There is no flag --oven-hat; did you mean --oven-heat?"),
        (["a", "--yeast"], "There is no flag --yeast; see bake.py --help."),
        (
            ["a", "--oven-heat", "x: " * 50],
            f"--oven-heat takes a whole number, but got '{'x: ' * 50}'.",
        ),
    ],
)
def test_a_wrong_argument_is_told_in_one_sentence(capsys, argv, sentence):
    code, out, err = exit_of(capsys, cli.run, bake, Bake, argv=argv, prog="bake.py")
    assert (code, out, err) == (2, "", sentence + "\n")


def test_help_names_what_there_is_in_our_spelling(capsys):
    code, out, _ = exit_of(capsys, cli.run, bake, Bake, argv=["--help"], prog="bake.py")
    assert code == 0
    for word in ("usage: bake.py", "Bake a cake.", "CAKE", "--oven-heat INT", "--dry-run", "180"):
        assert word in out
    assert "oven_heat" not in out


def test_the_preset_comes_first_and_digits_is_the_default():
    assert preset()[:2] == ("digits", PRESETS["digits"])
    assert preset("ring")[:2] == ("ring", PRESETS["ring"])
    name, config, run = preset("--workers", "0")
    assert (name, config, run) == ("digits", PRESETS["digits"], Run(workers=0))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_parsed_as_it_is(name):
    assert preset(name) == (name, PRESETS[name], Run())


def test_settings_carry_their_dotted_name_and_options_stand_beside_them():
    _, config, run = preset(
        *("mnist", "--optim.lr_g", "1e-3", "--gpu", "--model.z-dim", "3", "--run-id", "a"),
        *("--batch_size=64", "--transform.flip", "True", "--json", "--data", "s3://b/k"),
    )
    assert (config.optim.lr_g, config.model.z_dim, config.batch_size) == (1e-3, 3, 64)
    assert config.transform.flip is True
    assert config.optim.lr_d == PRESETS["mnist"].optim.lr_d
    assert run == Run(gpu=True, run_id="a", data="s3://b/k", json=True)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["mnits"],
            "There is no preset 'mnits'; choose one of ring, grid, digits, mnist, celeba, ",
        ),
        (["--workers", "two"], "--workers takes a whole number, but got 'two'."),
        (["--workers", "0", "ring"], "The argument 'ring' is not expected there; put the preset f"),
        (["--gpu", "3"], "The argument '3' is not expected there; see train.py --help."),
        (["--optim.lr-gg", "1"], "There is no flag --optim.lr-gg; did you mean --optim.lr_g?"),
        (["--lr_g", "1"], "There is no flag --lr_g; did you mean --optim.lr_g?"),
        (["--run.workers", "1"], "There is no flag --run.workers; did you mean --workers?"),
        (["--optim.lr_g", "fast"], "--optim.lr_g takes a number, but got 'fast'."),
        (["--optim.beta1", "3"], "optim.beta1 is 3.0, but must be in [0, 1)."),
        (["--transform.flip"], "--transform.flip needs a value; see train.py --help."),
        (["--transform.flip", "maybe"], "--transform.flip is 'maybe', but must be one of True, F"),
        (
            ["--model.norm", "layer"],
            "--model.norm is 'layer', but must be one of batch, sync, group, none.",
        ),
        (["--data", "--json"], "--data needs a value; see train.py --help."),
    ],
)
def test_a_wrong_setting_is_told_in_one_sentence(argv, sentence):
    with pytest.raises(UserError) as told:
        preset(*argv)
    assert str(told.value).startswith(sentence)
    assert "\n" not in str(told.value)


def test_run_preset_hands_over_all_three(capsys):
    argv = ["ring", "--optim.lr_g", "0.5", "--gpu", "--json"]
    code, out, _ = exit_of(capsys, cli.run_preset, train, Run, PRESETS, default="digits", argv=argv)
    assert code == 0
    assert json.loads(out) == {"name": "ring", "lr_g": 0.5, "workers": 2, "gpu": True}


def test_help_of_a_preset_shows_its_own_defaults(capsys):
    argv = ["celeba", "--help"]
    code, out, _ = exit_of(capsys, cli.run_preset, train, Run, PRESETS, default="digits", argv=argv)
    assert code == 0
    assert "--model.z_dim INT" in out
    assert "1024" in out
    assert "--run-id" in out
    assert "Train one model." in out


def test_verbs_share_one_command(capsys):
    verbs = {"bake": (bake, Bake), "eat": (lambda options: {"eaten": options.cake}, Bake)}
    more = {"prog": "kitchen.py"}
    code, out, _ = exit_of(capsys, cli.run_verb, verbs, argv=["eat", "tart", "--json"], **more)
    assert (code, json.loads(out)) == (0, {"eaten": "tart"})
    code, _, err = exit_of(capsys, cli.run_verb, verbs, argv=["burn"], **more)
    assert (code, err) == (2, "There is no kitchen.py 'burn'; choose one of bake, eat.\n")
    code, out, _ = exit_of(capsys, cli.run_verb, verbs, argv=["--help"], **more)
    assert code == 0
    assert "bake       Bake a cake." in out
    code, _, err = exit_of(capsys, cli.run_verb, verbs, argv=[], **more)
    assert (code, err) == (2, "kitchen.py needs a verb: bake or eat; see kitchen.py --help.\n")
    code, _, err = exit_of(capsys, cli.run_verb, verbs, argv=["eat"], **more)
    assert (code, err) == (2, "kitchen.py eat needs CAKE; see kitchen.py eat --help.\n")
