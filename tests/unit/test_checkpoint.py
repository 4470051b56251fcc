"""A checkpoint holds all that an exact continuation needs, and nothing unsafe."""

import json
from pathlib import Path

import pytest
import torch
from datasets import flip
from test_step import batches, tiny, weights

from ivegan import checkpoint
from ivegan.config import override
from ivegan.errors import UserError
from ivegan.step import create_state, train


def trained(name="digits", images=64, **changes):
    state = create_state(tiny(name, total_images=images, **changes))
    list(train(state, batches(state.config), images))
    return state


@pytest.mark.parametrize("name", ["ring", "mnist"])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(name, tmp_path):
    unbroken = trained(name, 128, optim__ema=0.9)
    half = trained(name, 64, optim__ema=0.9)
    uri = checkpoint.save(half, str(tmp_path / "run"), {})

    resumed = create_state(override(half.config, {"total_images": 128}))
    checkpoint.restore(resumed, uri)
    list(train(resumed, batches(resumed.config, resumed.step), 128))

    assert torch.equal(weights(resumed), weights(unbroken))
    assert resumed.average is not None
    assert unbroken.average is not None
    for a, b in zip(resumed.average.parameters(), unbroken.average.parameters(), strict=True):
        assert torch.equal(a, b)


def test_networks_come_back_in_eval_mode_with_the_averaged_weights(tmp_path):
    state = trained(optim__ema=0.9)
    uri = checkpoint.save(state, str(tmp_path), {"run_id": "a"})
    files = {p.name for p in Path(uri).iterdir()}
    assert files == {"weights.safetensors", "training.safetensors", "config.json"}  # no pickle
    config, encoder, generator, metadata = checkpoint.load_networks(uri)
    assert config == state.config
    assert metadata["run_id"] == "a"
    assert not encoder.training
    assert not generator.training
    assert state.average is not None
    for half, loaded in (("encoder", encoder), ("generator", generator)):
        averaged = getattr(state.average, half).state_dict()
        present = getattr(state.encoder_generator, half).state_dict()
        assert all(torch.equal(v, averaged[k]) for k, v in loaded.state_dict().items())
        assert not all(torch.equal(v, present[k]) for k, v in loaded.state_dict().items())


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    uri = checkpoint.save(trained(), str(tmp_path), {})
    other = create_state(tiny("digits", model__z_dim=3))
    with pytest.raises(UserError, match="z_dim"):
        checkpoint.restore(other, uri)


def test_an_unfinished_checkpoint_counts_as_absent(tmp_path):
    state = trained()
    first = checkpoint.save(state, str(tmp_path), {})
    list(train(state, batches(state.config, state.step), 16))
    state.step += 1
    second = checkpoint.save(state, str(tmp_path), {})
    assert checkpoint.checkpoints(str(tmp_path)) == [first, second]
    assert checkpoint.latest(str(tmp_path)) == second
    (Path(second) / "config.json").unlink()
    assert checkpoint.latest(str(tmp_path)) == first
    assert checkpoint.find(str(tmp_path)) == first


def test_nothing_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.find(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no checkpoint at"):
        checkpoint.load_networks(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read_metadata(str(tmp_path))


@pytest.mark.parametrize("name", ["weights.safetensors", "training.safetensors"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_used(name, tmp_path, caplog):
    state = trained()
    first = checkpoint.save(state, str(tmp_path), {})
    state.step += 1
    second = checkpoint.save(state, str(tmp_path), {})
    flip(Path(second) / name)
    with pytest.raises(UserError, match=f"{name} is not what was saved"):
        checkpoint.restore(create_state(state.config), second)
    assert checkpoint.latest(str(tmp_path)) == first
    assert "using the checkpoint before it" in caplog.text
    (Path(first) / "config.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.latest(str(tmp_path))


def test_files_that_are_cut_off_are_a_sentence(tmp_path):
    uri = checkpoint.save(trained(), str(tmp_path), {})
    metadata = json.loads((Path(uri) / "config.json").read_text())
    del metadata["files"]  # as before checkpoints had digests
    (Path(uri) / "config.json").write_text(json.dumps(metadata))
    weights_file = Path(uri) / "weights.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.load_networks(uri)


def test_the_last_checkpoints_and_the_marked_ones_are_kept(tmp_path):
    state, run = trained(), str(tmp_path)
    for step in range(1, 7):
        state.step = step
        uri = checkpoint.save(state, run, {})
        if step == 2:
            checkpoint.keep(uri)
        checkpoint.prune(run, 3)
    assert [int(uri[-10:]) // 16 for uri in checkpoint.checkpoints(run)] == [2, 4, 5, 6]


def test_what_a_killed_process_left_is_cleared(tmp_path):
    uri = checkpoint.save(trained(), str(tmp_path), {})
    (tmp_path / ".checkpoint-0000000128.x1" / "new").mkdir(parents=True)
    (tmp_path / "checkpoint-0000000256").mkdir()
    (tmp_path / "checkpoint-0000000256" / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "run.json").write_text("{}")
    checkpoint.clear_unfinished(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [Path(uri).name, "run.json"]
