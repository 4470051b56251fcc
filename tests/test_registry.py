"""Registered models: loadable by a stranger, moved in pairs, never changed unnoticed."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from ivegan import checkpoint
from ivegan.artifact import check_sums, find_pickles, write_sums
from ivegan.config import override, preset
from ivegan.errors import UserError
from ivegan.evaluate import quality
from ivegan.step import create_state
from pipelines import gate, registry

ENCODER, GENERATOR = "ivegan-digits-encoder", "ivegan-digits-generator"


def saved(folder: Path, run_id: str, seed: int = 0, name: str = "digits", **facts: str) -> str:
    """Return the URI of a small, untrained checkpoint."""
    state = create_state(override(preset(name), {"model.width": 0.25, "seed": seed}))
    known = {"preset": name, "run_id": run_id, "dataset_hash": name, "git_commit": "def"}
    known |= {"config_hash": "123", **facts}
    return checkpoint.save(state, str(folder / run_id), known)


@pytest.fixture
def open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let everything pass: for what is not about the gate."""
    verdict = gate.Verdict(score=1.0, holder_score=None, faults=())
    monkeypatch.setattr(gate, "examine", lambda *_, **__: verdict)


@pytest.fixture
def registered(home: Path, store: str, open_gate: None) -> dict[str, str]:
    """Return the checkpoints of two runs: the first in production, the second in staging."""
    first, second = (saved(home, name, seed) for seed, name in enumerate(("first", "second")))
    registry.register(first)
    registry.promote("digits")
    registry.register(second)
    return {"first": first, "second": second}


def words(store: str, name: str) -> dict[str, tuple[str, str | None]]:
    """Return by version (alias, stage, tag) as the store itself tells them."""
    client = MlflowClient(store)
    aliases = {str(v): k for k, v in client.get_registered_model(name).aliases.items()}
    return {
        str(v.version): (aliases.get(str(v.version), ""), v.current_stage)
        for v in client.search_model_versions(f"name='{name}'")
    }


STRANGER = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ivegan", "pipelines", "data_prep"):
            raise ImportError(name + " is project code")
sys.meta_path.insert(0, Nothing())
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
given = np.load(sys.argv[2])
out = {}
for name in ("encoder", "generator"):
    for how in ("@staging", "/Staging"):
        model = mlflow.pyfunc.load_model(f"models:/ivegan-digits-{name}{how}")
        out[name + how.strip("@/")] = np.asarray(model.predict(given[name]))
np.savez(sys.argv[3], **out)
"""


def test_a_stranger_loads_both_halves_by_alias_and_by_stage(registered, store, home):
    """A new process, with no project code to import, gets what the checkpoint computes."""
    _, encoder, generator, _ = checkpoint.load_networks(registered["second"])
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5, 1, 16, 16), dtype=np.uint8)
    latent = random.uniform(-1, 1, (5, 20)).astype(np.float32)
    np.savez(home / "given.npz", encoder=images, generator=latent)
    outside = home / "elsewhere"
    outside.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, store, str(home / "given.npz"), str(home / "out.npz")],
        cwd=outside,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        z = encoder(torch.from_numpy(images).float() / 255).numpy()
        g = generator(torch.from_numpy(latent[:, 16:]), torch.from_numpy(latent[:, :16])).numpy()
    found = np.load(home / "out.npz")
    for how in ("staging", "Staging"):
        np.testing.assert_allclose(found["encoder" + how], z, atol=1e-5)
        np.testing.assert_allclose(found["generator" + how], g, atol=1e-5)


def test_the_same_checkpoint_again_makes_no_second_version(registered, store):
    before = words(store, ENCODER)
    again = registry.register(registered["second"])
    assert again["new"] is False
    assert words(store, ENCODER) == before


def test_pairs_move_and_come_back_together(registered, store):
    for name in (ENCODER, GENERATOR):
        assert words(store, name) == {
            "1": ("production", "Production"),
            "2": ("staging", "Staging"),
        }
    registry.promote("digits")
    for name in (ENCODER, GENERATOR):
        assert words(store, name) == {"1": ("", "Archived"), "2": ("production", "Production")}
    registry.rollback("digits")
    for name in (ENCODER, GENERATOR):
        assert words(store, name) == {"1": ("production", "Production"), "2": ("", "Archived")}


def test_list_repairs_what_an_interruption_left_half_done(registered, store, monkeypatch):
    """The process dies after the encoder's alias has moved and before all else."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(registry, "settle", die)
        with pytest.raises(KeyboardInterrupt):
            registry.promote("digits")
    assert words(store, GENERATOR)["1"] == ("production", "Production")
    assert registry.overview()["repaired"]
    for name in (ENCODER, GENERATOR):
        assert words(store, name) == {"1": ("", "Archived"), "2": ("production", "Production")}
    assert registry.overview()["repaired"] == []


def test_pull_brings_weights_config_and_a_model_without_any_pickle(registered, home):
    facts = registry.pull(ENCODER, stage="staging", to=home / "got")
    assert facts["version"] == 2
    assert {p.name for p in (home / "got").iterdir()} == {
        "model",
        "weights.safetensors",
        "config.json",
        "model_card.md",
    }
    assert json.loads((home / "got" / "config.json").read_text())["run_id"] == "second"
    assert find_pickles(home / "got") == []
    card = (home / "got" / "model_card.md").read_text()
    assert "uint8, 0 to 255, images (N, 1, 16, 16) -> float32 latents z (N, 16)" in card
    assert "CC BY 4.0" in card
    assert "Not evaluated" in card


def test_a_changed_artifact_is_refused(registered, store, home):
    where = MlflowClient(store).get_model_version_download_uri(ENCODER, "2")
    weights = Path(urlparse(where).path) / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"Not as they were registered: weights\.safetensors"):
        registry.pull(ENCODER, stage="staging", to=home / "got")
    with pytest.raises(UserError, match="Not as they were registered"):
        registry.promote("digits")
    assert words(store, ENCODER)["1"] == ("production", "Production")


def test_a_model_that_computes_something_else_is_not_registered(home, store, monkeypatch):
    uri = saved(home, "bent")
    before = registry.EncoderModel.forward
    monkeypatch.setattr(registry, "TOLERANCE", 1e-12)
    monkeypatch.setattr(
        registry.Half, "batch", lambda half, size, seed=0: np.full((size, 1, 16, 16), seed, "u1")
    )
    exported = []

    def forward(model, x):
        exported.append(x)
        return before(model, x) + (0.5 if len(exported) <= 3 else 0)

    monkeypatch.setattr(registry.EncoderModel, "forward", forward)
    with pytest.raises(UserError, match="away from its network"):
        registry.register(uri)
    assert MlflowClient(store).search_registered_models() == []


def test_the_better_pair_passes_and_the_worse_is_refused_with_the_number(home, store, monkeypatch):
    monkeypatch.setitem(gate.LEAST, "ring", 0.0)
    monkeypatch.setattr(gate, "MARGIN", 0.0)
    uris = [saved(home, f"run{seed}", seed, "ring") for seed in range(2)]
    scores = []
    for uri in uris:
        config, encoder, generator, _ = checkpoint.load_networks(uri)
        scores.append(quality(config, encoder, generator, None, home)["quality"])
    worse, better = sorted(range(2), key=lambda i: scores[i])
    assert scores[worse] < scores[better]
    registry.register(uris[worse])
    done = registry.promote("ring")
    assert done["quality"] == pytest.approx(scores[worse])
    registry.register(uris[better])
    done = registry.promote("ring")
    assert (done["quality"], done["quality_of_replaced"]) == pytest.approx(
        (scores[better], scores[worse])
    )
    registry.promote("ring", to="staging", version=1)
    with pytest.raises(UserError, match=rf"{scores[worse]:.3f} is under {scores[better]:.3f}"):
        registry.promote("ring")
    name = "ivegan-ring-generator"
    assert words(store, name)["2"] == ("production", "Production")
    done = registry.promote("ring", force="the newer one answers too slowly")
    assert len(done["overruled"]) == 1
    tags = MlflowClient(store).get_model_version(name, "1").tags
    assert tags["forced_because"] == "the newer one answers too slowly"
    assert float(tags["quality"]) == pytest.approx(scores[worse])


def test_an_untrained_pair_of_unknown_origin_is_refused(home, store, digits_dataset):
    registry.register(saved(home, "a", data=digits_dataset, git_commit=""))
    with pytest.raises(UserError) as told:
        registry.promote("digits")
    sentence = str(told.value)
    assert "is under 0.4, the least for digits" in sentence
    assert "does not say its git_commit" in sentence
    assert "is not the data set that it was trained on" in sentence
    assert words(store, ENCODER)["1"] == ("staging", "Staging")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: registry.pull("ivegan-digits-encodr", to=Path("x")), "No model is registered as"),
        (lambda: registry.pull(ENCODER, stage="nowhere", to=Path("x")), "has no version nowhere"),
        (lambda: registry.promote("mnist"), "No version of mnist is in staging"),
        (lambda: registry.rollback("mnist"), "No version of mnist is in production"),
        (lambda: registry.register("nowhere"), "nowhere"),
    ],
)
def test_what_is_not_there_is_told(registered, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


def test_a_planted_pickle_is_found_however_deep(tmp_path):
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("harmless.bin", pickle.dumps({"a": 1}))
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("data/inner", inner.getvalue())
    (tmp_path / "model.pt2").write_bytes(outer.getvalue())
    (tmp_path / "text").write_text("nothing.")
    assert find_pickles(tmp_path) == ["model.pt2!data/inner!harmless.bin"]


@pytest.mark.parametrize("spoil", ["change", "add", "remove", "list"])
def test_checksums_notice_every_change(tmp_path, spoil):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    digest = write_sums(tmp_path)
    check_sums(tmp_path, digest)
    match spoil:
        case "change":
            (tmp_path / "a").write_text("c")
        case "add":
            (tmp_path / "c").write_text("c")
        case "remove":
            (tmp_path / "a").unlink()
        case "list":
            (tmp_path / "SHA256SUMS").write_text("")
    with pytest.raises(UserError):
        check_sums(tmp_path, digest)
