"""Finished work found by its inputs: the same run again, and never a spoilt or another one."""

import json
from pathlib import Path

import pytest

from ivegan.config import override, preset
from ivegan.errors import UserError
from pipelines.flows import finished
from pipelines.training.fit import fit
from pipelines.training.plan import Plan, Run, check_data, git_commit, resolve

CONFIG = override(preset("ring"), {"batch_size": 64, "total_images": 640})


def plan_of(run_id: str, *, config=CONFIG, name: str = "ring", **options) -> Plan:
    run = Run(run_id=run_id, resume=True, **{"workers": 0, **options})
    return resolve(name, config, run)


@pytest.fixture
def trained(store):
    """Return (plan, inputs, result) of a training that ended and was noted."""
    plan = plan_of("first")
    inputs = finished.inputs_of(plan, check_data(plan))
    result = fit(plan)
    finished.note_training(plan, inputs, result)
    return plan, inputs, result


def test_a_finished_training_is_found_by_a_run_of_another_name(trained):
    plan, inputs, result = trained
    other = plan_of("second")
    assert finished.inputs_of(other, check_data(other)) == inputs
    entry = finished.find_training(other, inputs)
    assert entry is not None
    assert entry["outcome"] == result
    assert entry["git_commit"] == git_commit()
    assert finished.find_training(plan, inputs) == entry


@pytest.mark.parametrize(
    "change",
    [
        {"config": override(CONFIG, {"seed": 1})},
        {"config": override(CONFIG, {"total_images": 1280})},
        {"name": "ring-plus"},
        {"workers": 2},
        {"threads": 2},
        {"precision": "bfloat16"},
        {"stream": True},
        {"gpu": True},
    ],
)
def test_other_inputs_find_nothing(trained, change):
    _, inputs, _ = trained
    other = plan_of("second", **change)
    changed = finished.inputs_of(other, "ring")
    assert changed != inputs
    assert finished.find_training(other, changed) is None


def test_other_data_find_nothing(trained):
    plan, _, _ = trained
    assert finished.find_training(plan, finished.inputs_of(plan, "another hash")) is None


def test_a_storage_that_is_moved_as_a_whole_keeps_what_is_finished(trained):
    plan, inputs, result = trained
    (folder := Path(plan.run_uri).parent).rename(moved := folder.with_name("moved"))
    found = finished.find_training(plan_of("second", storage=str(moved)), inputs)
    assert found is not None
    name = Path(result["checkpoint"]).name
    assert found["outcome"]["checkpoint"] == str(moved / "first" / name)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["weights.safetensors", "training.pt"])
@pytest.mark.parametrize("spoil", [_flip, Path.unlink])
def test_a_spoilt_checkpoint_is_not_used(trained, name, spoil):
    plan, inputs, result = trained
    spoil(Path(result["checkpoint"]) / name)
    with pytest.raises(UserError, match="not those that the training wrote"):
        finished.find_training(plan, inputs)


def test_a_checkpoint_that_is_gone_is_not_used(trained):
    plan, inputs, result = trained
    (Path(result["checkpoint"]) / "config.json").unlink()
    with pytest.raises(UserError, match="There is no checkpoint at"):
        finished.find_training(plan, inputs)


def test_a_note_cut_short_or_of_other_inputs_is_not_used(trained):
    plan, inputs, _ = trained
    (note,) = (Path(plan.run_uri).parent / "finished").iterdir()
    text = note.read_text()
    note.write_text(json.dumps({**json.loads(text), "inputs": {**inputs, "preset": "grid"}}))
    with pytest.raises(UserError, match="is not of these inputs"):
        finished.find_training(plan, inputs)
    note.write_text(text[:-10])
    with pytest.raises(UserError, match="is not readable as JSON"):
        finished.find_training(plan, inputs)
