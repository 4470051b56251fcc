"""Registered models: loadable by MLflow alone, moved in pairs, verified before they are loaded."""

import hashlib
import io
import itertools
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import pytest
from cuts import CutError, copied, cut_after
from datasets import flip
from mlflow import MlflowClient, set_tracking_uri

from ivegan import checkpoint, storage
from ivegan.config import override, preset, to_dict
from ivegan.errors import UserError
from ivegan.evaluation.evaluate import quality
from ivegan.step import create_state
from pipelines import registry
from pipelines.models import card, gate, package, stages
from pipelines.models.pull import pull
from pipelines.models.register import register
from pipelines.models.stages import overview, promote, rollback
from pipelines.record import RunRecord, write_record
from pipelines.tracking.mirror import sync

PASS = {"quality": 1.0}, None, []
ENCODER, GENERATOR = NAMES = "ivegan-digits-encoder", "ivegan-digits-generator"


def saved(folder: Path, run_id: str, seed: int = 0, name: str = "digits", **metadata: str) -> str:
    """Return the URI of a small, untrained checkpoint."""
    state = create_state(override(preset(name), {"model.width": 0.25, "seed": seed}))
    origin = {"preset": name, "run_id": run_id, "dataset_hash": name, "git_commit": "def"}
    return checkpoint.save(state, str(folder / run_id), {**origin, "config_hash": "1", **metadata})


class Registered(NamedTuple):
    """A store with two runs: the first in production, the second in staging."""

    home: Path
    store: str
    checkpoints: list[str]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Registered:
    """Return a store that ``registered`` restores; paths in it are absolute."""
    home = tmp_path_factory.mktemp("registered")
    (home / "runs").mkdir()
    shutil.copy(empty_store, home / "runs" / "mlflow.db")
    checkpoints = [saved(home, name, seed) for seed, name in enumerate(("first", "second"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(home)
        patch.setattr(gate, "examine", lambda *_: PASS)
        register(checkpoints[0])
        promote("digits")
        register(checkpoints[1])
    shutil.copytree(home, f"{home}-template")
    return Registered(home, f"sqlite:///{home}/runs/mlflow.db", checkpoints)


@pytest.fixture
def registered(home: Path, template: Registered, monkeypatch: pytest.MonkeyPatch) -> Registered:
    """Return a store with two registered runs, in the present folder; every pair passes."""
    shutil.rmtree(template.home / "runs" / "artifacts")
    # The database is overwritten, not replaced: MLflow keeps it open.
    shutil.copytree(f"{template.home}-template", template.home, dirs_exist_ok=True)
    monkeypatch.chdir(template.home)
    monkeypatch.setattr(gate, "examine", lambda *_: PASS)
    return template


def stages_in(store: str, preset: str = "digits") -> dict[str, tuple[str, str | None]]:
    """Return (alias, MLflow stage) by version, which are the same of both halves."""
    client, halves = MlflowClient(store), []
    for name in (f"ivegan-{preset}-{kind}" for kind in ("encoder", "generator")):
        aliases = {str(v): k for k, v in client.get_registered_model(name).aliases.items()}
        versions = client.search_model_versions(f"name='{name}'")
        found = {str(v.version): v.current_stage for v in versions}
        halves.append({number: (aliases.get(number, ""), stage) for number, stage in found.items()})
    assert halves[0] == halves[1]
    return halves[0]


def files_of(store: str, name: str, version: str) -> Path:
    return Path(urlparse(MlflowClient(store).get_model_version_download_uri(name, version)).path)


def test_pairs_move_and_come_back_together_with_the_same_files(registered):
    home, store, checkpoints = registered

    def sums(to: Path, version: int) -> dict[str, str]:
        for name in NAMES:
            assert pull(name, to=to / name)["partner_version"] == version
        return {
            str(path.relative_to(to)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in to.rglob("*")
            if path.is_file() and path.name != "registered_model_meta"  # of the download
        }

    before = sums(home / "before", 1)
    assert stages_in(store) == {"1": ("production", "Production"), "2": ("staging", "Staging")}
    assert promote("digits")["replaced"] == 1
    assert stages_in(store) == {"1": ("", "Archived"), "2": ("production", "Production")}
    between = sums(home / "between", 2)
    assert rollback("digits")["replaced"] == 2
    assert stages_in(store) == {"1": ("production", "Production"), "2": ("", "Archived")}
    assert [row["stage"] for row in overview()["versions"]] == ["archived", "production"] * 2
    assert sums(home / "after", 1) == before
    assert before.keys() == between.keys()
    assert between[f"{ENCODER}/weights.safetensors"] != before[f"{ENCODER}/weights.safetensors"]
    # The same checkpoint again makes no second version.
    assert register(checkpoints[1])["new"] is False
    assert stages_in(store)["2"] == ("staging", "Staging")
    assert len(stages_in(store)) == 2


def test_a_run_that_mlflow_missed_is_mirrored_before_it_is_registered(home, store, mlflow_runs):
    uri = saved(home / "runs" / "checkpoints", "a")
    record = RunRecord(
        run_id="a",
        preset="digits",
        config=checkpoint.read_metadata(uri)["config"],
        experiment="ivegan-digits",
        key="a-key",
        status="FINISHED",
    )
    write_record(uri.rpartition("/")[0], record)
    registered = register(uri)
    assert sync(home / "runs" / "checkpoints") == {}
    (run,) = mlflow_runs(store)
    assert run.info.run_id == registered["mlflow_run_id"]
    assert run.data.tags["run_key"] == "a-key"


def test_a_damaged_pair_in_production_can_be_replaced(registered):
    store = registered.store
    (files_of(store, GENERATOR, "1") / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"the pair in production cannot be measured \(.*--force"):
        promote("digits")
    result = promote("digits", force="its files are lost")
    assert (result["replaced"], len(result["overruled"])) == (1, 1)
    assert stages_in(store)["2"] == ("production", "Production")


def test_a_pair_that_is_out_of_reach_is_not_taken_for_damaged(registered, monkeypatch):
    check = stages._check_pair

    def unavailable(pair: stages.Pair) -> package.Halves:
        if pair.encoder.version in (1, "1"):
            raise storage.Unavailable("The object store does not answer.")
        return check(pair)

    monkeypatch.setattr(stages, "_check_pair", unavailable)
    with pytest.raises(storage.Unavailable):
        promote("digits", force="now")
    assert stages_in(registered.store)["1"] == ("production", "Production")


def test_pull_names_the_place_that_is_at_fault(registered):
    home, store, _ = registered
    (home / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/got cannot be a folder"):
        pull(ENCODER, to=home / "file" / "got")
    weights = files_of(store, ENCODER, "2") / "weights.safetensors"
    flip(weights)
    with pytest.raises(UserError, match=r"weights\.safetensors was changed"):
        pull(ENCODER, stage="staging", to=home / "got")
    weights.unlink()
    with pytest.raises(UserError, match=r"weights\.safetensors is missing"):
        promote("digits")
    assert stages_in(store)["1"] == ("production", "Production")


def test_pull_brings_weights_config_and_a_model_without_any_pickle(registered):
    home = registered.home
    result = pull(ENCODER, stage="staging", to=home / "got")
    assert (result["version"], result["partner_version"]) == (2, 2)
    names = ["config.json", "model", "model_card.md", "weights.safetensors"]
    assert sorted(p.name for p in (home / "got").iterdir()) == names
    assert json.loads((home / "got" / "config.json").read_text())["run_id"] == "second"
    text = (home / "got" / "model_card.md").read_text()
    assert "uint8, 0 to 255, images (N, 1, 16, 16) -> float32 latents z (N, 16)" in text
    assert "CC BY 4.0" in text
    assert "Not evaluated" in text
    assert len(list((home / "runs" / "artifacts").rglob("model.pt2"))) == 4
    for path in (home / "runs" / "artifacts").rglob("*"):
        if path.is_file():
            assert list(pickles(path.name, path.read_bytes())) == []


def pickles(name: str, content: bytes) -> Iterator[str]:
    """Yield the names of pickles in a file and in zip archives within it."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for member in archive.namelist():
                yield from pickles(f"{name}!{member}", archive.read(member))
        return
    by_magic = content[:1] == b"\x80" and content[1:2] <= b"\x05" and content[-1:] == b"."
    if by_magic or (content and name.endswith((".pkl", ".pickle", ".pt", ".pth", ".joblib"))):
        yield name


def test_the_card_has_the_spread_over_seeds_of_the_same_settings(home):
    """Others differ in width or data, were not evaluated, or have a damaged evaluation."""
    for seed, accuracy in enumerate((0.8, 0.9, 0.5, 0.4, None)):
        width, data = (0.5 if seed == 2 else 0.25), str(seed == 3)
        config = to_dict(override(preset("digits"), {"model.width": width, "seed": seed}))
        metadata = {"config": config, "dataset_hash": data}
        key = "facts" if seed == 1 else "metadata"  # of version 0.1
        evaluation = {"metrics": {"eval/same_class": accuracy}, key: metadata}
        uri = home / "runs" / f"run{seed}" / "evaluation-0000000009" / "metrics.json"
        if accuracy is not None:
            storage.write_bytes(uri, json.dumps(evaluation).encode())
    storage.write_bytes(home / "runs/run5/evaluation-0000000009/metrics.json", b'{"metrics": {')
    evaluations = card.evaluations_of(str(home / "runs" / "run0"), 9)
    assert evaluations == [{"eval/same_class": 0.8}, {"eval/same_class": 0.9}]
    assert card.evaluations_of(str(home / "runs" / "run4"), 9) == []
    metadata = {"config": to_dict(preset("digits")), "images_seen": 9}
    text = card.render("a", "encoder", "", metadata, evaluations)
    assert "| | this run | mean ± sd of 2 seeds | to compare with |" in text
    assert "| Same class | 80.00 % | 85.00 % ± 7.07 % |" in text
    assert "spread is unknown" not in text
    assert "spread is unknown" in card.render("a", "encoder", "", metadata, evaluations[:1])
    metadata["config"] = to_dict(preset("celeba"))
    text = card.render("a", "generator", "", metadata, [])
    assert "**Its licence allows non-commercial research only" in text
    assert "must not be used to recognise or depict a person" in text


def test_a_model_that_computes_something_else_is_not_registered(home, store, monkeypatch):
    uri = saved(home, "bent")
    forward = package.EncoderModel.forward
    monkeypatch.setattr(package, "TOLERANCE", 1e-12)
    monkeypatch.setattr(
        package.Half, "batch", lambda half, size, seed=0: np.full((size, 1, 16, 16), seed, "u1")
    )
    calls = []

    def other_when_exported(model, x):
        calls.append(x)
        return forward(model, x) + (0.5 if len(calls) <= 3 else 0)

    monkeypatch.setattr(package.EncoderModel, "forward", other_when_exported)
    with pytest.raises(UserError, match="away from its network"):
        register(uri)
    assert MlflowClient(store).search_registered_models() == []


def test_the_better_pair_passes_and_the_worse_is_refused_with_the_number(home, store, monkeypatch):
    monkeypatch.setitem(gate.LEAST, "ring", {})
    monkeypatch.setattr(gate, "MARGIN", 0.0)
    uris = [saved(home, f"run{seed}", seed, "ring") for seed in range(2)]
    scores = []
    for uri in uris:
        config, encoder, generator, _ = checkpoint.load_networks(uri)
        scores.append(quality(config, encoder, generator, None, home)["quality"])
    worse, better = sorted(range(2), key=lambda i: scores[i])
    assert scores[worse] < scores[better]
    register(uris[worse])
    assert promote("ring")["scores"]["quality"] == pytest.approx(scores[worse])
    register(uris[better])
    result = promote("ring")
    assert result["scores"]["quality"] == pytest.approx(scores[better])
    assert result["scores_of_replaced"]["quality"] == pytest.approx(scores[worse])
    promote("ring", to="staging", version=1)
    with pytest.raises(UserError, match=rf"{scores[worse]:.3f} is under {scores[better]:.3f}"):
        promote("ring")
    assert stages_in(store, "ring")["2"] == ("production", "Production")
    reason = "the newer one answers too slowly"
    result = promote("ring", force=reason)
    assert len(result["overruled"]) == 1
    tags = MlflowClient(store).get_model_version("ivegan-ring-generator", "1").tags
    assert json.loads(tags["gate"])["overruled"] == result["overruled"]
    assert float(tags["quality"]) == pytest.approx(scores[worse])
    history = [json.loads(tags[name]) for name in sorted(tags) if name.startswith("changed.")]
    moves = [None, "staging", "production", "archived", "staging", "production"]
    assert [(c["from"], c["to"]) for c in history] == list(itertools.pairwise(moves))
    assert history[1]["gate"]["scores"]["quality"] == pytest.approx(scores[worse])
    assert history[1]["gate"]["forced_because"] is None
    assert history[-1]["gate"]["forced_because"] == reason


def test_a_poor_pair_of_unknown_origin_is_refused(home, store, digits_dataset, monkeypatch):
    scores = {"quality": 0.33, "same_class": 0.1, "one_nn": 0.9}
    monkeypatch.setattr(gate, "quality", lambda *_, **__: scores)
    register(saved(home, "a", data=digits_dataset, git_commit=""))
    with pytest.raises(
        UserError,
        match=r"git_commit is not recorded; .* is not the data set .*; "
        r"its quality 0\.330 is under 0\.4, .*; its same_class 0\.100 is under 0\.3",
    ):
        promote("digits")
    assert stages_in(store)["1"] == ("staging", "Staging")


def test_the_check_in_the_docs_accepts_a_model_and_refuses_a_changed_one(registered):
    set_tracking_uri(registered.store)  # stronger than the variable
    text = (Path(__file__).resolve().parents[2] / "docs" / "mlflow.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    for graph in (registered.home / "runs" / "artifacts").rglob("model.pt2"):
        graph.write_bytes(b"")
    with pytest.raises(AssertionError):
        exec(code, {})


def test_a_damaged_tag_is_one_sentence_and_hides_no_version(registered):
    client = MlflowClient(registered.store)
    client.set_model_version_tag(ENCODER, "1", "images_seen", "many")
    rows = {(row["name"], row["version"]): row for row in overview()["versions"]}
    assert rows[ENCODER, 1]["images_seen"] is None
    assert len(rows) == 4
    promote("digits")
    client.set_model_version_tag(ENCODER, "1", "gate", "[1]")
    with pytest.raises(UserError, match=rf"tag gate of version 1 of {ENCODER} is damaged"):
        rollback("digits")


@pytest.mark.parametrize("verb", ["promote", "register"])
def test_the_command_again_completes_a_change_cut_between_any_two_calls(
    registered, monkeypatch, verb
):
    """The change is tried again and again, cut later each time."""
    home, store, _ = registered
    third = saved(home, "third", seed=3)
    # Models are neither exported nor loaded after each cut.
    monkeypatch.setattr(package, "_write", copied(package._write, home / "models"))
    monkeypatch.setattr(stages, "_check_pair", lambda _: ())
    monkeypatch.setattr(package, "check", lambda *_: None)
    monkeypatch.setattr(stages, "_measure", lambda *_: {"scores": {"quality": 1.0}})
    original = (home / "runs" / "mlflow.db").read_bytes()
    change, production, staging, step = {
        "promote": (lambda: promote("digits"), 2, None, 1),
        "register": (lambda: register(third), 1, 3, 4),
    }[verb]
    differed, calls, was_cut = False, 0, True
    while was_cut:
        (home / "runs" / "mlflow.db").write_bytes(original)
        with pytest.MonkeyPatch.context() as patch:
            cut_after(calls, patch)
            try:
                change()
                was_cut = False
            except CutError:
                calls += step
        if was_cut:
            differed |= bool(overview()["differences"])
            change()
        assert overview()["differences"] == []
        for name in NAMES:
            aliases = MlflowClient(store).get_registered_model(name).aliases
            assert aliases.get("production") == production
            assert aliases.get("staging") == staging
            for version in MlflowClient(store).search_model_versions(f"name='{name}'"):
                changes = sorted(k for k in version.tags if k.startswith("changed."))
                last = json.loads(version.tags[changes[-1]])["to"]
                assert last == (version.current_stage or "").lower()
    assert calls > 8
    assert differed


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: pull("ivegan-digits-encodr", to=Path("x")), "No model is registered as"),
        (lambda: pull(ENCODER, stage="nowhere", to=Path("x")), "has no version nowhere"),
        (lambda: promote("mnist"), "No version of mnist is in staging"),
        (lambda: rollback("mnist"), "No version of mnist is in production"),
        (lambda: register("nowhere"), "nowhere"),
        (lambda: registry.main_sync(registry.Sync(storage="nowhere")), "There is no folder"),
    ],
)
def test_a_missing_thing_is_named(home, store, call, sentence):
    MlflowClient(store).create_registered_model(ENCODER)
    MlflowClient(store).create_model_version(ENCODER, str(home))
    with pytest.raises(UserError, match=sentence):
        call()
