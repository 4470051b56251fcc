"""Registered models: loadable by a stranger, moved in pairs, never changed unnoticed."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors.numpy import save

from ivegan import checkpoint, storage
from ivegan.config import override, preset, to_dict
from ivegan.errors import UserError
from ivegan.evaluation.evaluate import quality
from ivegan.step import create_state
from pipelines import registry
from pipelines.models import card as model_card
from pipelines.models import gate
from pipelines.models import package as models
from pipelines.models.artifact import check_sums, find_pickles, write_sums

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
    verdict = gate.Verdict(scores={"quality": 1.0}, holder_scores=None, faults=())
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


def test_a_rollback_brings_back_the_very_same_files(registered, home):
    def sums(to: Path) -> dict[str, str]:
        for name in (ENCODER, GENERATOR):
            registry.pull(name, to=to / name)
        files = (path for path in to.rglob("*") if path.is_file())
        return {
            str(path.relative_to(to)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.name != "registered_model_meta"  # MLflow's note of the download
        }

    before = sums(home / "before")
    registry.promote("digits")
    between = sums(home / "between")
    registry.rollback("digits")
    assert sums(home / "after") == before
    assert len(before) == len(between) > 10
    weights = f"{ENCODER}/weights.safetensors"
    assert between[weights] != before[weights]


@pytest.mark.parametrize("damage", ["change", "delete"])
def test_a_damaged_pair_in_production_can_be_replaced(registered, store, damage):
    where = MlflowClient(store).get_model_version_download_uri(GENERATOR, "1")
    folder = Path(urlparse(where).path)
    if damage == "delete":
        shutil.rmtree(folder)
    else:
        (folder / "weights.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=r"the pair in production cannot be measured \(.*--force"):
        registry.promote("digits")
    done = registry.promote("digits", force="its files are lost")
    (fault,) = done["overruled"]
    assert fault.startswith("the pair in production cannot be measured (")
    assert done["replaced"] == 1
    assert words(store, GENERATOR)["2"] == ("production", "Production")


def test_a_pair_that_is_out_of_reach_is_no_damaged_one(registered, store, monkeypatch):
    def away(*_: object) -> None:
        raise storage.Unavailable("The object store does not answer.")

    monkeypatch.setattr(registry, "_loaded", away)
    with pytest.raises(storage.Unavailable):
        registry.promote("digits", force="now")
    assert words(store, ENCODER)["1"] == ("production", "Production")


def test_a_candidate_keeps_its_word_when_a_promotion_comes_between(registered, store, home):
    """It is registered just before the promotion empties staging, and so takes its word."""
    third = saved(home, "third", seed=3)
    delete = MlflowClient.delete_registered_model_alias
    with pytest.MonkeyPatch.context() as patch:

        def register_first(client: MlflowClient, name: str, alias: str) -> None:
            patch.undo()
            registry.register(third)
            delete(client, name, alias)

        patch.setattr(MlflowClient, "delete_registered_model_alias", register_first)
        registry.promote("digits")
    assert words(store, ENCODER)["2"] == ("production", "Production")
    for name in (ENCODER, GENERATOR):
        assert words(store, name)["3"] == ("staging", "Staging")
    # One that is taken back by hand stays so.
    delete(MlflowClient(store), ENCODER, "staging")
    registry.overview()
    assert words(store, ENCODER)["3"] == ("", "Archived")


def test_list_gives_a_candidate_the_word_that_it_never_got(registered, store, home, monkeypatch):
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    registry.promote("digits")
    with monkeypatch.context() as broken:
        broken.setattr(registry, "_set_alias", die)
        with pytest.raises(KeyboardInterrupt):
            registry.register(saved(home, "third", seed=3))
    assert f"{ENCODER}@staging -> 3" in registry.overview()["repaired"]
    for name in (ENCODER, GENERATOR):
        assert words(store, name)["3"] == ("staging", "Staging")


def test_pull_blames_the_place_that_is_at_fault(registered, home, monkeypatch):
    (home / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/got cannot be written .* choose another --to"):
        registry.pull(ENCODER, to=home / "file" / "got")

    def unreadable(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/store/model")

    monkeypatch.setattr(models, "fetch", unreadable)
    with pytest.raises(UserError, match=r"Version 1 of .* cannot be copied .*/store/model"):
        registry.pull(ENCODER, to=home / "got")


def test_the_card_of_faces_tells_what_its_licence_allows():
    facts = {"config": to_dict(preset("celeba")), "images_seen": 1}
    card = model_card.render("a", "generator", "", facts, {}, [])
    assert "**Its licence allows non-commercial research only, and so for what is made" in card
    assert "must not be used to recognise or to depict anybody" in card


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


def test_the_card_tells_the_spread_over_seeds_of_the_same_settings(home, store):
    """Of four runs one differs in more than its seed, and one was not evaluated."""
    client = MlflowClient(store)
    experiment = client.create_experiment("ivegan-digits", (home / "runs" / "a").as_uri())
    same = [0.8, 0.9, 0.5, None]
    for seed, accuracy in enumerate(same):
        run = client.create_run(experiment).info.run_id
        width = 0.5 if accuracy == 0.5 else 0.25
        for name, value in {
            "seed": seed,
            "model.width": width,
            "workers": seed,
            "total_images": 9,
        }.items():
            client.log_param(run, name, value)
        if accuracy is not None:
            client.log_metric(run, "eval/same_class", accuracy)
            client.set_tag(run, "mlflow.runName", f"run{seed}")
    (first,) = [r for r in client.search_runs([experiment]) if r.info.run_name == "run0"]
    evaluations = models._evaluations(client, first)
    assert evaluations[first.info.run_id] == {"eval/same_class": 0.8}
    assert sorted(v for one in evaluations.values() for v in one.values()) == [0.8, 0.9]
    facts = {"config": to_dict(preset("digits")), "images_seen": 1}
    told = [{"eval/same_class": value} for value in (0.8, 0.9)]
    card = model_card.render("a", "encoder", "", facts, told[0], told)
    assert "| | this run | mean ± sd of 2 seeds | to hold it against |" in card
    assert "| Same class | 80.00 % | 85.00 % ± 7.07 % |" in card
    assert "no spread is known" not in card
    assert "no spread is known" in model_card.render("a", "encoder", "", facts, told[0], told[:1])


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
    before = models.EncoderModel.forward
    monkeypatch.setattr(models, "TOLERANCE", 1e-12)
    monkeypatch.setattr(
        models.Half, "batch", lambda half, size, seed=0: np.full((size, 1, 16, 16), seed, "u1")
    )
    exported = []

    def forward(model, x):
        exported.append(x)
        return before(model, x) + (0.5 if len(exported) <= 3 else 0)

    monkeypatch.setattr(models.EncoderModel, "forward", forward)
    with pytest.raises(UserError, match="away from its network"):
        registry.register(uri)
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
    registry.register(uris[worse])
    done = registry.promote("ring")
    assert done["scores"]["quality"] == pytest.approx(scores[worse])
    registry.register(uris[better])
    done = registry.promote("ring")
    assert done["scores"]["quality"] == pytest.approx(scores[better])
    assert done["scores_of_replaced"]["quality"] == pytest.approx(scores[worse])
    registry.promote("ring", to="staging", version=1)
    with pytest.raises(UserError, match=rf"{scores[worse]:.3f} is under {scores[better]:.3f}"):
        registry.promote("ring")
    name = "ivegan-ring-generator"
    assert words(store, name)["2"] == ("production", "Production")
    done = registry.promote("ring", force="the newer one answers too slowly")
    assert len(done["overruled"]) == 1
    tags = MlflowClient(store).get_model_version(name, "1").tags
    told = json.loads(tags["gate"])
    assert told["forced_because"] == "the newer one answers too slowly"
    assert told["overruled"] == done["overruled"]
    assert float(tags["quality"]) == pytest.approx(scores[worse])
    history = [json.loads(tags[name]) for name in sorted(tags) if name.startswith("changed.")]
    moves = ["staging", "production", "archived", "staging", "production"]
    assert [change["to"] for change in history] == moves
    assert [change["from"] for change in history] == [None, *moves[:-1]]
    assert history[1]["gate"]["scores"]["quality"] == pytest.approx(scores[worse])
    assert history[1]["gate"]["forced_because"] is None
    assert history[-1]["gate"]["forced_because"] == "the newer one answers too slowly"


def test_an_untrained_pair_of_unknown_origin_is_refused(home, store, digits_dataset):
    registry.register(saved(home, "a", data=digits_dataset, git_commit=""))
    with pytest.raises(UserError) as told:
        registry.promote("digits")
    sentence = str(told.value)
    assert "its quality 0" in sentence
    assert "its same_class 0" in sentence
    assert "is under 0.4, the least for digits" in sentence
    assert "does not say its git_commit" in sentence
    assert "is not the data set that it was trained on" in sentence
    assert words(store, ENCODER)["1"] == ("staging", "Staging")


def test_a_pair_that_is_not_of_its_checkpoint_is_refused(registered, store, home):
    other = Path(registered["first"]) / "weights.safetensors"
    Path(registered["second"], "weights.safetensors").write_bytes(other.read_bytes())
    with pytest.raises(UserError, match=r"the encoder is not that of its checkpoint.*generator is"):
        registry.promote("digits")
    shutil.rmtree(registered["second"])
    with pytest.raises(UserError, match=r"second.* is gone"):
        registry.promote("digits")
    assert words(store, ENCODER)["1"] == ("production", "Production")


class CutError(Exception):
    """The process that writes to MLflow dies before its next call."""


class Fragile:
    """Cuts the calls that write to MLflow's registry, after so many of them."""

    WRITING = re.compile("^(set_|delete_|transition_|create_|log_|finalize_)")

    def __init__(self, patch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        self.was_cut = False
        for name in filter(self.WRITING.match, dir(MlflowClient)):
            patch.setattr(MlflowClient, name, self._counted(getattr(MlflowClient, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                self.was_cut = True
                raise CutError
            self.left -= 1
            return call(*args, **kwargs)

        return counted


def one_run_everywhere(store: str) -> str:
    """Return the run in production, after seeing that nothing contradicts it."""
    client, runs = MlflowClient(store), {}
    for name in (ENCODER, GENERATOR):
        aliases = client.get_registered_model(name).aliases
        assert set(aliases) <= {"staging", "production"}
        for version in client.search_model_versions(f"name='{name}'"):
            held = [word for word, number in aliases.items() if number == version.version]
            stage = (version.current_stage or "none").lower()
            assert stage == (held[0] if held else stage)
            assert held or stage in ("none", "archived")
            assert version.tags.get("stage", "none") == stage
            changes = sorted(k for k in version.tags if k.startswith("changed."))
            assert (json.loads(version.tags[changes[-1]])["to"] if changes else "none") == stage
            for word in held:
                runs.setdefault(word, set()).add(version.tags["run_id"])
    assert all(len(found) == 1 for found in runs.values()), runs
    return runs["production"].pop()


@pytest.mark.parametrize("verb", ["promote", "rollback", "register"])
def test_a_change_cut_between_any_two_calls_is_repaired(registered, store, home, verb):
    """The whole change is tried again and again, cut one call later each time."""
    if verb == "rollback":
        registry.promote("digits")
    third = saved(home, "third", seed=3)
    kept = (home / "runs" / "mlflow.db").read_bytes()
    change = {
        "promote": lambda: registry.promote("digits"),
        "rollback": lambda: registry.rollback("digits"),
        "register": lambda: registry.register(third),
    }[verb]
    before, after = {"promote": ("first", "second"), "rollback": ("second", "first")}.get(
        verb, ("first", "first")
    )
    seen, calls = set(), 0
    while True:
        (home / "runs" / "mlflow.db").write_bytes(kept)
        with pytest.MonkeyPatch.context() as patch:
            fragile = Fragile(patch, calls)
            with contextlib.suppress(CutError):
                change()
        registry.overview()
        assert registry.overview()["repaired"] == []
        seen.add(one_run_everywhere(store))
        if fragile.was_cut:
            assert one_run_everywhere(store) in (before, after)
            change_again = registry.register if verb == "register" else None
            if change_again is not None:  # the command again ends what was begun
                change_again(third)
                assert words(store, ENCODER)["3"] == ("staging", "Staging")
                assert words(store, GENERATOR)["3"] == ("staging", "Staging")
                one_run_everywhere(store)
            calls += 1
        else:
            break
    assert calls > 3
    assert one_run_everywhere(store) == after
    assert seen == {before, after}


RACER = """
import sys
from pipelines import registry
from pipelines.models import gate
gate.examine = lambda *_, **__: gate.Verdict(scores={"quality": 1.0}, holder_scores=None, faults=())
print("ready", flush=True)
for version in sys.stdin.readline().split():
    registry.promote("digits", version=int(version))
"""


def test_promotions_at_once_end_with_one_run_everywhere(registered, store, home):
    registry.register(saved(home, "third", seed=3))
    orders = ["2 3 2 3 1", "3 1 3 2 2"]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER],
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in orders
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer, order in zip(racers, orders, strict=True):
        assert racer.stdin is not None
        racer.stdin.write(order + "\n")
        racer.stdin.flush()
    for racer in racers:
        _, errors = racer.communicate()
        assert racer.returncode == 0, errors
    registry.overview()
    assert registry.overview()["repaired"] == []
    assert one_run_everywhere(store) in ("first", "second", "third")


def test_nothing_that_a_registered_pair_brings_is_a_pickle(registered, store, home):
    kept = home / "runs" / "artifacts"
    assert len(list(kept.rglob("model.pt2"))) == 4
    assert find_pickles(kept) == []
    (kept / "planted.txt").write_bytes(pickle.dumps({"a": 1}))
    assert find_pickles(kept) == ["planted.txt"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: registry.pull("ivegan-digits-encodr", to=Path("x")), "No model is registered as"),
        (lambda: registry.pull(ENCODER, stage="nowhere", to=Path("x")), "has no version nowhere"),
        (lambda: registry.promote("mnist"), "No version of mnist is in staging"),
        (lambda: registry.rollback("mnist"), "No version of mnist is in production"),
        (lambda: registry.register("nowhere"), "nowhere"),
        (
            lambda: registry.main_sync(registry.Sync(journals="nowhere")),
            "There is no folder .*nowhere of journals",
        ),
    ],
)
def test_what_is_not_there_is_told(registered, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


PICKLE = pickle.dumps({"a": 1})


def zipped(content: bytes, name: str = "inner", **how: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **how) as archive:
        archive.writestr(name, content)
    return out.getvalue()


def tarred(content: bytes, mode: Literal["w", "w:gz", "w:xz"] = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        member = tarfile.TarInfo("inner")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "where"),
    [
        *[pytest.param(pickle.dumps({"a": 1}, p), "", id=f"protocol {p}") for p in range(6)],
        pytest.param(pickle.dumps({"a": 1}, 0) + b"and more", "", id="protocol 0 and more"),
        pytest.param(pickle.dumps(print, 1) + b"and more", "", id="protocol 1 and more"),
        pytest.param(b"cos\nsystem\n(S'id'\ntR and no end", "", id="a call without an end"),
        pytest.param(PICKLE + zipped(b"harmless"), "", id="pickle before a zip"),
        pytest.param(zipped(zipped(PICKLE), "data/x"), "!data/x!inner", id="zip in zip"),
        pytest.param(tarred(PICKLE), "!inner", id="tar"),
        pytest.param(tarred(PICKLE, "w:gz"), "!content!inner", id="tar.gz"),
        pytest.param(tarred(PICKLE, "w:xz"), "!content!inner", id="tar.xz"),
        pytest.param(tarred(PICKLE) + zipped(b"harmless"), "!inner", id="tar before a zip"),
        pytest.param(gzip.compress(PICKLE), "!content", id="gzip"),
        pytest.param(bz2.compress(zipped(PICKLE)), "!content!inner", id="zip in bzip2"),
        pytest.param(npy(np.array([{}])), "", id="npy of objects"),
        pytest.param(npy(np.zeros(1, [("a", "O")])), "", id="npy with a field of objects"),
        pytest.param(gzip.compress(bytes(65 << 20)), "", id="gzip bomb"),
        pytest.param(zipped(bytes(65 << 20), compression=8), "", id="zip bomb"),
        pytest.param(gzip.compress(PICKLE)[:-9], "", id="broken gzip"),
    ],
)
def test_a_planted_pickle_is_found_wherever_it_is(tmp_path, content, where):
    """And so is what nobody can look into."""
    (tmp_path / "planted").write_bytes(content)
    assert find_pickles(tmp_path) == [f"planted{where}"]


def test_what_is_no_pickle_is_not_taken_for_one(tmp_path):
    """Among it are files that begin as one might."""
    random = np.random.default_rng(0)
    weights = {"a": random.standard_normal((99, 99)).astype(np.float32)}
    png = io.BytesIO()
    Image.fromarray(random.integers(0, 256, (9, 9), dtype=np.uint8)).save(png, "png")
    for number, content in enumerate(
        [
            save(weights),
            png.getvalue(),
            npy(weights["a"]),
            weights["a"].tobytes(),
            zipped(b"}q."),
            tarred(json.dumps({"a": 1}).encode()),
            gzip.compress(b"a: 1\n"),
            bytes(2000),
            b"",
            b"nothing.",
            b"channels:\n- defaults\ndependencies:\n- python=3.11.\n",
            b"(in words\nof two lines\n)",
            b"c0ffee  MLmodel\nd00d  data/model.pt2\n",
        ]
    ):
        (tmp_path / str(number)).write_bytes(content)
    assert find_pickles(tmp_path) == []


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
