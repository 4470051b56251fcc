"""Every command answers a mistake with a message and status 2, and --json with one object."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import botocore.utils
import pytest
import requests
from processes import program

from ivegan.config import PRESETS
from ivegan.errors import UserError
from pipelines import options as cli
from pipelines import record
from pipelines.training import plan
from pipelines.training.plan import Run


@dataclass(frozen=True, kw_only=True)
class Bake(cli.Options):
    """Bake a cake."""

    cake: str
    """Which cake."""
    oven_heat: int = 180
    """Degrees."""


@dataclass(frozen=True, kw_only=True)
class Eat(cli.Options):
    """Eat something."""

    food: str
    """What."""


def bake(options: Bake) -> dict[str, Any]:
    options.at_least(oven_heat=50)
    print(f"baking {options.cake}")
    if options.cake == "unwatched":
        raise KeyboardInterrupt
    if options.cake == "stone":
        raise UserError("A stone cannot be baked:\n  choose a cake.")
    return {"cake": options.cake, "heat": options.oven_heat, "taste": float("nan")}


def train(name: str, config: Any, run: Run) -> dict[str, Any]:
    return {"name": name, "lr_g": config.optim.lr_g, "workers": run.workers, "gpu": run.gpu}


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the script, and keep ``run`` from adding a log handler to the whole test session."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["kitchen.py"])


def exit_of(capsys, function, *arguments, **options):
    """Return exit status, stdout and stderr of a function that ends the process."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments, **options)
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def preset(*argv: str):
    return cli.parse_preset(argv, PRESETS, Run, default="digits")


def test_the_last_line_of_stdout_is_one_json_object(capsys):
    code, out, err = exit_of(capsys, cli.run, bake, Bake, argv=["tart", "--json"])
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "baking tart"
    assert json.loads(out.splitlines()[-1]) == {"cake": "tart", "heat": 180, "taste": None}
    assert exit_of(capsys, cli.run, bake, Bake, argv=["tart"]) == (0, "baking tart\n", "")


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["stone", "--json"], 2, "A stone cannot be baked: choose a cake.\n"),
        (["tart", "--oven-heat", "20"], 2, "--oven-heat is 20, but must be 50 or more.\n"),
        (["unwatched"], 130, "stopped\n"),
    ],
)
def test_a_mistake_and_ctrl_c_are_one_line_on_stderr_with_a_status(capsys, argv, status, message):
    code, _, err = exit_of(capsys, cli.run, bake, Bake, argv=argv)
    assert (code, err) == (status, message)


def test_the_preset_comes_first_and_has_a_default():
    for name in PRESETS:
        assert preset(name) == (name, PRESETS[name], Run())
    assert preset("--workers", "0") == ("digits", PRESETS["digits"], Run(workers=0))
    with pytest.raises(UserError, match="There is no preset 'mnits'; choose one of ring, grid, "):
        preset("mnits")


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
    ("argv", "name"),
    [
        (["--optim.lr_gg", "1"], "--optim.lr-g"),
        (["--optim.beta1", "3"], "optim.beta1 is 3.0, but must be in [0, 1)."),
        (["--transform.flip"], "--transform.flip"),
    ],
)
def test_a_wrong_setting_is_named_on_stderr_with_status_2(capsys, argv, name):
    options = {"default": "digits", "argv": argv}
    code, out, err = exit_of(capsys, cli.run_preset, train, Run, PRESETS, **options)
    assert (code, out) == (2, "")
    assert name in err


def test_help_of_a_preset_shows_its_own_defaults(capsys):
    argv = ["celeba", "--help"]
    code, out, _ = exit_of(capsys, cli.run_preset, train, Run, PRESETS, default="digits", argv=argv)
    assert code == 0
    for word in ("--model.z-dim INT", "1024", "--run-id", "Train one preset of IVE-GAN."):
        assert word in out


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["eat", "tart", "--json"], 0, '{"eaten": "tart"}'),
        (["--help"], 0, "Bake a cake."),
        (["burn"], 2, "burn"),
        ([], 2, "{bake, eat}"),
        (["eat"], 2, "kitchen.py eat --help"),
    ],
)
def test_verbs_share_one_command(capsys, words, status, text):
    verbs = {"bake": (bake, Bake), "eat": (lambda options: {"eaten": options.food}, Eat)}
    code, out, err = exit_of(capsys, cli.run_verb, verbs, argv=words)
    assert code == status
    assert text in (err if status else out)


@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 2, "The output cannot be written: No space left"),
        ("| sleep 0", 0, ""),
    ],
)
def test_closed_full_and_unread_outputs(home, store, redirection, status, message):
    """A closed or unread output is none; one on a full disk ends in a sentence."""
    words = program("train.py", "ring", "--workers", "0", "--total-images", "640", "--json")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$0" "$@" {redirection}', *words],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Error" not in done.stderr
    assert message in done.stderr
    runs = (home / "runs" / "checkpoints").glob("*")
    ended = [record.read_record(str(run)).status for run in runs]
    # When a full disk is noticed depends on the size of the buffer of stdout.
    assert ended == ["FINISHED"] or (status and "RUNNING" not in ended)


@pytest.mark.parametrize(
    ("name", "given", "beside"),
    [
        ("http_proxy", "", ""),
        ("HTTPS_PROXY", ".example.org,10.0.0.0/8", "s3.example.org"),
        ("ALL_PROXY", "*", "x.org"),
    ],
)
def test_a_proxy_does_not_stand_before_this_machine(name, given, beside, monkeypatch):
    for one in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for written in (one, one.upper()):
            monkeypatch.setenv(written, "")  # so that it is put back afterwards
            monkeypatch.delenv(written)
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", given)
    with pytest.raises(SystemExit):
        cli.run(bake, Bake, argv=["tart"])
    for host in filter(None, ("127.0.0.1:5000", "localhost:8265", beside)):
        assert botocore.utils.should_bypass_proxies(f"http://{host}")
        assert requests.utils.should_bypass_proxies(f"http://{host}", None)
    assert requests.utils.should_bypass_proxies("http://example.com", None) == (given == "*")


@pytest.mark.parametrize(
    ("cpus", "quota", "address", "workers"),
    [(1, "max", "", 1), (4, "100000", "", 1), (4, "max", "", 2), (1, "max", "head:6379", 2)],
)
def test_where_one_cpu_is_there_one_worker_is_the_default(
    cpus, quota, address, workers, tmp_path, monkeypatch, caplog
):
    (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
    monkeypatch.setattr(plan, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setenv("RAY_ADDRESS", address)
    plan.default_workers.cache_clear()
    assert plan.Run().workers == plan.Run().workers == workers
    assert caplog.text.count("one CPU: one worker by default instead of two") == 2 - workers
    assert plan.Run(workers=2).workers == 2
    plan.default_workers.cache_clear()


def test_numbers_of_workers_are_those_that_divide_the_batch(capsys):
    for words, sizes in (("1:4", [4, 2, 1]), ("3:6", [6, 4, 3]), ("2", [2]), ("0", [0])):
        argv = ["--workers", words, "--batch-size", "24" if words == "3:6" else "64"]
        _, config, run = cli.parse_preset(argv, PRESETS, plan.Run, default="digits")
        assert plan.sizes_of(config, run) == sizes
    for words in ("0:2", "4:1", "x:2", ":3", "1:", "1:2:3", "1.5"):
        with pytest.raises(SystemExit, match="2"):
            cli.parse_preset(["--workers", words], PRESETS, plan.Run, default="digits")
        assert words in capsys.readouterr().err
