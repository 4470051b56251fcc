"""Times and retries of a workflow's steps, as they are written and as they are kept."""

import subprocess
import sys

import pytest

from ivegan.errors import UserError
from pipelines.flows import limits


def test_what_is_not_named_keeps_its_default():
    seconds, retries = limits.parse("train=0.5, retries=3")
    assert seconds["train"] == 30
    assert retries == 3
    plain, once = limits.parse("")
    assert {k: v / 60 for k, v in plain.items()} == limits.MINUTES
    assert once == limits.RETRIES
    assert {k for k in plain if plain[k] != seconds[k]} == {"train"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trian=3", "knows no 'trian'"),
        ("train", "takes a number, but got ''"),
        ("train=long", "takes a number, but got 'long'"),
        ("train=0", "must be 1 second to 1 year"),
        ("train=nan", "must be 1 second to 1 year"),
        ("retries=5", "must be 0 to 4"),
        ("retries=1.5", "must be 0 to 4"),
    ],
)
def test_a_limit_that_cannot_be_is_told(text, sentence):
    with pytest.raises(UserError, match=sentence):
        limits.parse(text)


def test_what_is_given_stands_before_the_environment(monkeypatch):
    monkeypatch.setenv(limits.VARIABLE, "train=1")
    assert limits.arguments()[0]["train"] == {"seconds": 60}
    assert limits.text("train=2") == "train=2"


def test_a_step_that_looks_at_no_signal_ends_all_the_same():
    """SIGALRM, Metaflow's timeout, waits for ever when the main thread is stuck outside Python."""
    stuck = (
        "import signal, threading\n"
        "from pipelines import flow\n"
        "flow.GRACE, flow.TIMEOUT['train']['seconds'] = 0, 1\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "flow.bounded('train')(lambda _: threading.Event().wait())(None)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", stuck], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:01)!" in done.stderr
