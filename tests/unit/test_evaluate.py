import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ivegan import checkpoint, order
from ivegan.config import override, preset
from ivegan.errors import UserError
from ivegan.evaluation import evaluate, images, pictures, points, report
from ivegan.evaluation.classifier import Settings, classifier_of
from ivegan.evaluation.sampling import Sampler
from ivegan.step import create_state
from ivegan.transforms import transform
from pipelines.evaluate import Evaluate, main

QUICK = Settings(images=9000, epochs=1, channels=(16, 32, 32))
NUM_TEST = 80  # held-out digits that are looked at
CPU = torch.device("cpu")


class PerfectRing(nn.Module):
    """A generator that draws from the ring itself, one mode for each eighth of z's range."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # on a device

    def forward(self, noise: Tensor, z: Tensor) -> Tensor:
        means, std = order.modes("ring")
        which = ((z[:, 0] + 1) * 4).long().clamp(0, 7)
        return torch.from_numpy(means).float()[which] + std * noise[:, :2]


class PerfectCodes(nn.Module):
    """An encoder that puts a point's mode into the first entry of z."""

    def forward(self, x: Tensor) -> Tensor:
        means, _ = order.modes("ring")
        nearest = torch.cdist(x, torch.from_numpy(means).float()).argmin(1)
        return torch.stack([(nearest + 0.5) / 4 - 1, torch.zeros(len(x))], dim=1)


class Copy(PerfectRing):
    """A generator that returns the image that it gets as z, whatever z' is."""

    def forward(self, noise: Tensor, z: Tensor) -> Tensor:
        return z.unflatten(1, (1, 16, 16)).clamp(0, 1)


@pytest.fixture(scope="module", autouse=True)
def quick_classifier() -> Iterator[None]:
    """Train the classifier for a second rather than ten."""
    with pytest.MonkeyPatch.context() as patch:
        quick = functools.partial(classifier_of, settings=QUICK)
        patch.setattr(images, "classifier_of", quick)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def saved(where: Path, name: str, data: str | None = None, **changes: object) -> str:
    """Return the URI of an untrained checkpoint."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    config = override(preset(name), {"model.width": 0.25, **dotted})
    metadata = {"run_id": "<tiny>", "data": data, "preset": name, "dataset_hash": "abc"}
    return checkpoint.save(create_state(config), str(where / "run"), metadata)


def run(uri: str, out: Path, cache: Path, data: str | None = None) -> dict:
    return evaluate.evaluate(uri, data, out, cache_dir=cache, limit=NUM_TEST)


@pytest.fixture(scope="module")
def digits_checkpoint(tmp_path_factory: pytest.TempPathFactory, digits_dataset: str) -> str:
    return saved(tmp_path_factory.mktemp("digits-run"), "digits", digits_dataset, model__z_dim=5)


@pytest.fixture(scope="module")
def first(
    digits_checkpoint: str, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """Return the folder and the summary of one evaluation of digits."""
    out = tmp_path_factory.mktemp("report")
    return out, run(digits_checkpoint, out, cache)


@pytest.fixture(scope="module")
def ring(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Return a checkpoint of points, and the summary of its evaluation."""
    uri = saved(tmp_path_factory.mktemp("ring"), "ring")
    return uri, evaluate.evaluate(uri, None, tmp_path_factory.mktemp("page"), cache_dir=cache)


def test_an_evaluation_writes_numbers_figures_and_a_page(first):
    out, result = first
    written = {path.name for path in out.iterdir()}
    names = {"samples", "samples_fitted", "reconstructions", "latent", "interpolation"}
    names.add("variations")
    assert written == {f"{name}.png" for name in names} | {"metrics.json", "report.html"}
    stored = json.loads((out / "metrics.json").read_text())
    assert stored["metrics"] == result["metrics"]
    assert stored["metadata"]["evaluated"] == NUM_TEST
    assert all(np.isfinite(value) for value in result["metrics"].values())
    metrics = result["metrics"]  # of an untrained generator, which keeps no class
    assert metrics["eval/same_class"] < 0.4
    assert metrics["eval/classifier_accuracy"] > 0.7
    assert metrics["eval/frechet"] > 5 * metrics["eval/frechet_floor"]
    assert metrics["eval/one_nn_pixels"] > 0.9
    for path in result["figures"].values():
        with Image.open(path) as page:
            assert min(page.size) > 300
            assert np.asarray(page.convert("L")).std() > 5


def test_the_command_gives_the_same_files_again_and_prints_every_number(
    ring, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("IVEGAN_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(1234)
    result = main(Evaluate(checkpoint=ring[0], out=str(tmp_path / "out")))
    for path in Path(ring[1]["report"]).parent.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    printed = capsys.readouterr().out
    for row in report.rows(result["metrics"]):
        line = rf"^{re.escape(row.meaning.title)} +{re.escape(row.value)} +"
        assert re.search(line, printed, re.MULTILINE)
        assert row.compare in printed
    assert result["report"] in printed
    assert len(result["figures"]) == 3


def test_numbers_of_one_network_are_those_of_the_evaluation(first, ring, digits_checkpoint, cache):
    def is_part(numbers: dict[str, float], whole: dict[str, float]) -> bool:
        return {f"eval/{name}": value for name, value in numbers.items()}.items() <= whole.items()

    config, encoder, _, metadata = checkpoint.load_networks(digits_checkpoint)
    split = images.load(config, metadata["data"], "test", cache, NUM_TEST)
    codes = images.measure(Sampler(config, encoder, None, CPU), split, cache, 0)[0]
    assert is_part(codes, first[1]["metrics"])
    assert "one_nn" in codes
    assert "frechet" not in codes
    config, encoder, generator, _ = checkpoint.load_networks(ring[0])
    both = points.measure(Sampler(config, encoder, generator, CPU), 0)
    samples = points.measure(Sampler(config, None, generator, CPU), 0)
    assert is_part(both, ring[1]["metrics"])
    assert samples.items() < both.items()
    assert points.measure(Sampler(config, None, generator, CPU), 1) != samples


def test_every_number_is_explained_or_explains_another(first, ring):
    explained = {f"eval/{n}" for meaning in report.MEANINGS.values() for _, n in meaning.compare}
    explained |= {f"eval/{name}" for name in report.MEANINGS}
    assert explained >= first[1]["metrics"].keys() | ring[1]["metrics"].keys()


def test_the_page_needs_nothing_but_itself_and_holds_every_number(first):
    page, metrics = (first[0] / "report.html").read_text(), first[1]["metrics"]
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]+", "", page)
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 6
    assert "&lt;tiny&gt;" in page
    assert "<tiny>" not in page
    for name in ("same_class", "frechet", "kmeans_nmi", "retrieval"):
        assert report.shown(report.MEANINGS[name], metrics[f"eval/{name}"]) in page
    assert f"chance: {100 * metrics['eval/same_class_shuffled']:.2f} %" in page


def test_copying_scores_as_the_classifier_and_not_at_all_in_variation(digits_dataset, cache):
    config = override(preset("digits"), {"model.z_dim": 256})
    copier = Sampler(config, nn.Flatten(), Copy(), CPU)
    split = images.load(config, digits_dataset, "test", cache, NUM_TEST)
    codes = copier.encode(split.x)
    result = images.generation(copier, split, codes, cache, seed=0)
    assert result["same_class"] == result["classifier_accuracy"]
    result = images.invariance(copier, split.x, codes, seed=0)
    assert 0.1 < result["retrieval"] < 1.0  # pixels do move under T
    assert result["retrieval"] == result["retrieval_pixels"]  # codes of a copier are pixels
    still = override(config, {"transform.shift": 0.0, "transform.rotate": 0.0})
    still = Sampler(still, nn.Flatten(), Copy(), CPU)
    assert images.invariance(still, split.x, codes, seed=0)["retrieval"] == 1.0
    result = images.transformation(copier, split.x, codes, seed=0)
    assert result["variation_ratio"] == 0.0
    assert result["registered_error"] < 1e-9
    assert result["registered_error_chance"] > 5 * result["registered_error_floor"]
    for name in ("dx", "dy", "theta"):
        assert result[f"transform/r2_{name}"] == 0.0


class Moving(nn.Module):
    """A generator that moves the image that it gets as z, as the first entries of z' direct."""

    def forward(self, noise: Tensor, z: Tensor) -> Tensor:
        draws = torch.full((len(z), 7), 0.5)
        draws[:, :3] = torch.special.ndtr(noise[:, :3])
        return transform(z.unflatten(1, (1, 16, 16)), draws, preset("digits").transform)


def test_z_prime_that_sets_t_explains_t(digits_dataset, cache):
    config = override(preset("digits"), {"model.z_dim": 256})
    sampler = Sampler(config, nn.Flatten(), Moving(), CPU)
    split = images.load(config, digits_dataset, "test", cache, 120)
    codes, x = sampler.encode(split.x), split.x
    generated = images.generation(
        sampler, split, codes, cache, seed=0, fitted=torch.from_numpy(sampler.encode(split.train))
    )
    for name in ("frechet_recon", "frechet_fitted"):  # they are T(x), and not x
        assert generated[name] < 1.5 * generated["frechet_recon_floor"], name
    result = images.transformation(sampler, x, codes, seed=0)
    assert result["variation_ratio"] == pytest.approx(1, abs=0.1)
    assert result["registered_error"] == pytest.approx(result["registered_error_floor"], abs=1e-3)
    for name in ("dx", "dy", "theta"):
        assert result[f"transform/r2_{name}"] > 0.8, name


def test_a_fitted_prior_lies_where_the_codes_lie():
    rng = np.random.default_rng(0)
    codes = np.array([[0.9, 0, 0], [0, -0.9, 0]])[rng.integers(2, size=500)]
    codes += 0.01 * rng.standard_normal((500, 3))
    z = images.fitted_prior(codes.astype(np.float32), 100, seed=0).numpy()
    first = z[:, 0] > 0.5
    np.testing.assert_allclose(z[first], np.tile([0.9, 0, 0], (first.sum(), 1)), atol=0.1)
    np.testing.assert_allclose(z[~first], np.tile([0, -0.9, 0], ((~first).sum(), 1)), atol=0.1)
    assert 20 < first.sum() < 80


def test_quality_is_one_for_a_perfect_ring_and_low_for_an_untrained_one(ring, tmp_path):
    perfect = evaluate.quality(preset("ring"), PerfectCodes(), PerfectRing(), None, tmp_path)
    assert set(perfect) == {"quality", "right_mode", "coverage", "high_quality"}
    assert list(perfect.values()) == pytest.approx([1] * 4, abs=0.01)
    config, encoder, generator, _ = checkpoint.load_networks(ring[0])
    assert evaluate.quality(config, encoder, generator, None, tmp_path)["quality"] < 0.5


def test_quality_of_images_lies_between_nothing_and_one(digits_checkpoint, digits_dataset, cache):
    config, encoder, generator, _ = checkpoint.load_networks(digits_checkpoint)
    result = evaluate.quality(config, encoder, generator, digits_dataset, cache)
    parts = [result[name] for name in ("same_class", "one_nn", "near")]
    assert 0 < result["quality"] < 0.7
    assert result["quality"] == pytest.approx(sum(parts) / 3)
    assert result["frechet"] > 0
    few = evaluate.quality(config, encoder, generator, digits_dataset, cache, limit=50)
    assert few != result
    assert few["quality"] == pytest.approx(result["quality"], abs=0.1)
    copier = override(preset("digits"), {"model.z_dim": 256})
    better = evaluate.quality(copier, nn.Flatten(), Copy(), digits_dataset, cache)
    assert better["quality"] > result["quality"]


def test_the_density_shows_the_checkpoints_of_the_run_up_to_this_one(tmp_path):
    state = create_state(override(preset("ring"), {"model.width": 0.25}))
    uris = []
    for step in (1, 2, 3):
        state.step = step
        uris.append(checkpoint.save(state, str(tmp_path / "run"), {}))
    config, encoder, generator, _ = checkpoint.load_networks(uris[1])
    model = Sampler(config, encoder, generator, CPU)
    panels = points._history(model, uris[1], 10, seed=0)
    assert [name for name, _ in panels] == ["1.02 k samples", "2.05 k samples"]


def test_a_picture_of_originals_takes_the_classes_in_turn():
    labels = np.array([2, 2, 2, 0, 1, 1, 0, 2])
    assert pictures.one_of_each(labels, 6).tolist() == [3, 4, 0, 6, 5, 1]


def test_attributes_are_coloured_by_the_first_that_is_on():
    names = ["Young", "Bangs", "Eyeglasses", "Blond_Hair", "Wearing_Hat"]
    attributes = np.array([[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0]])
    labels, shown = pictures.rarest(attributes, names)
    assert shown == ["Eyeglasses", "Wearing_Hat", "Bangs", "Blond_Hair"]
    assert labels.tolist() == [-1, 0, 3]


def test_what_cannot_be_evaluated_is_refused(digits_dataset, tmp_path):
    shape = r"\(1, 16, 16\), but the checkpoint's networks"
    for uri, data, sentence in (
        (str(tmp_path / "nowhere"), None, "no checkpoint at"),
        (saved(tmp_path / "a", "digits"), None, "give --data"),
        (saved(tmp_path / "b", "mnist"), digits_dataset, shape),
    ):
        with pytest.raises(UserError, match=sentence):
            run(uri, tmp_path / "out", tmp_path, data)
    out = str(tmp_path / "out")
    for options, sentence in (
        (Evaluate(checkpoint=uri, out=out, limit=1), "limit is 1"),
        (Evaluate(checkpoint=uri), "needs --out"),
        (Evaluate(checkpoint=uri, out=out, device="gpu"), "must be cpu or cuda"),
    ):
        with pytest.raises(UserError, match=sentence):
            main(options)


@pytest.mark.parametrize(
    ("trained_on", "options", "own"),
    [("ring", {}, True), ("ring", {"seed": 1}, False), ("other data", {}, False)],
)
def test_only_the_own_evaluation_goes_into_the_runs_folder(
    trained_on, options, own, home, tmp_path
):
    state = create_state(override(preset("ring"), {"model.width": 0.25}))
    uri = checkpoint.save(state, str(home / "run"), {"dataset_hash": trained_on})
    main(Evaluate(checkpoint=uri, out=str(tmp_path / "out"), **options))
    assert (home / "run" / "evaluation-0000000000" / "metrics.json").exists() == own


@pytest.mark.parametrize("half", ["encoder", "generator"])
def test_networks_that_diverged_are_named(half, cache, tmp_path):
    state = create_state(override(preset("ring"), {"model.width": 0.25}))
    with torch.no_grad():
        next(getattr(state.encoder_generator, half).parameters()).fill_(float("nan"))
    uri = checkpoint.save(state, str(tmp_path / "run"), {})
    with pytest.raises(UserError, match=f"{half} of this checkpoint diverged"):
        run(uri, tmp_path / "out", cache)


def test_a_dry_run_prints_the_plan_and_does_nothing(
    digits_checkpoint, digits_dataset, tmp_path, capsys
):
    run_uri = digits_checkpoint.rpartition("/")[0]
    out = tmp_path / "out"
    plan = main(Evaluate(checkpoint=run_uri, out=str(out), dry_run=True))
    assert plan["checkpoint"] == digits_checkpoint
    assert plan["data"] == digits_dataset
    assert digits_checkpoint in capsys.readouterr().out
    assert not out.exists()
