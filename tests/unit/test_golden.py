"""Numbers, data sets and checkpoints of version 0.1.0 stay what they were.

Losses and digests in ``tests/golden/start.json`` come from ``tests/golden/compare.py``, the files
below ``start/`` from a run of ``digits`` at width 0.05.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ivegan import checkpoint, order
from ivegan.config import from_dict
from ivegan.data.batches import batches
from ivegan.data.cache import load_split
from ivegan.data.manifest import read_manifest
from ivegan.step import create_state, train

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
START = GOLDEN / "start"
NUMBERS = json.loads((GOLDEN / "start.json").read_text())
STEPS = 5


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("preset", "source"), [("ring", "drawn"), ("digits", "cached")])
def test_losses_are_those_of_version_0_1_0(preset, source, float64, digits_dataset, tmp_path):
    config = from_dict(json.loads((GOLDEN / f"{preset}.json").read_text()))
    state = create_state(config)
    split = load_split(digits_dataset, "train", tmp_path) if preset == "digits" else None
    doubles = (
        (x.double(), order.Draws(*(draw.double() for draw in draws)))
        for x, draws in batches(config, split, 0, 0, 1, state.device)
    )
    steps = [p.metrics for p in itertools.islice(train(state, doubles, 64), STEPS)]
    for name in steps[0]:
        expected = NUMBERS[f"losses {preset} {source} 1 ranks {name}"][:STEPS]
        assert [m[name] for m in steps] == pytest.approx([float.fromhex(v) for v in expected])


def test_digits_are_the_same_bytes(digits_dataset):
    for name, digest in NUMBERS.items():
        build, _, file = name.partition("build digits ")
        if not build and file.endswith(".tar"):
            content = Path(digits_dataset, file).read_bytes()
            assert hashlib.sha256(content).hexdigest() == digest, file


def test_a_manifest_of_version_0_1_0_is_read():
    manifest = read_manifest(str(START))
    assert manifest.splits == {"train": 1347, "valid": 150, "test": 300}
    run = json.loads((START / "run.json").read_text())
    assert manifest.hash == run["dataset_hash"]


def test_a_checkpoint_of_version_0_1_0_is_resumed(digits_dataset, tmp_path):
    config = from_dict(json.loads((START / "run.json").read_text())["config"])
    state = create_state(config)
    checkpoint.restore(state, checkpoint.find(str(START)))
    assert state.images_seen == 32
    split = load_split(digits_dataset, "train", tmp_path)
    steps = list(train(state, batches(config, split, 2, 0, 1, state.device), 1))
    entries = map(json.loads, (START / "journal.jsonl").read_text().splitlines())
    logged = {e["step"]: e["metrics"] for e in entries if "loss/D" in e.get("metrics", {})}
    for progress in steps:
        expected = logged[progress.images_seen]
        for name, value in progress.metrics.items():
            assert value == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    assert state.images_seen == 64
