"""Raw files become the same shards however many write them, or a sentence says why not."""

import gzip
import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import build as build_module
from data_prep import celeba, mnist
from data_prep.build import build, make_plan, write_shard
from data_prep.verify import verify
from ivegan import data, shards, storage
from ivegan.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path) -> Path:
    """Return a folder in MNIST's layout with 24 + 10 images, half of the files gzipped."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for half, count in (("train", 24), ("t10k", 10)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        (folder / f"{half}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(idx(labels))
    return folder


def faces(folder: Path, counts: tuple[int, ...] = (5, 3, 2), size=(178, 218)) -> Path:
    """Write a folder in CelebA's layout, with images that were never faces."""
    folder.mkdir(parents=True)
    names = [f"{i + 1:06d}.jpg" for i in range(sum(counts))]
    with zipfile.ZipFile(folder / celeba.ZIP, "w") as archive:
        archive.writestr("img_align_celeba/", b"")
        for name in names:
            jpeg = io.BytesIO()
            pixels = RNG.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(jpeg, "jpeg")
            archive.writestr(f"img_align_celeba/{name}", jpeg.getvalue())
    attributes = [" ".join(f"Attribute_{i}" for i in range(40)) + " "]
    for number, name in enumerate(names):
        values = [1 if (number >> bit) & 1 else -1 for bit in range(40)]
        attributes.append(f"{name} " + " ".join(f"{value:2d}" for value in values))
    (folder / celeba.ATTRIBUTES).write_text("\n".join([str(len(names)), *attributes]) + "\n")
    parts = [part for part, count in enumerate(counts) for _ in range(count)]
    rows = [f"{name} {part}" for name, part in zip(names, parts, strict=True)]
    (folder / celeba.PARTITION).write_text("\n".join(rows) + "\n")
    (folder / celeba.IDENTITY).write_text("\n".join(f"{n} {i}" for i, n in enumerate(names)) + "\n")
    return folder


@pytest.fixture
def face_folder(tmp_path) -> Path:
    return faces(tmp_path / "faces")


def samples_of(out: Path | str, split: str) -> list[shards.Sample]:
    manifest = shards.read_manifest(str(out))
    parts = [storage.read_bytes(storage.join(out, s.key)) for s in manifest.of_split(split)]
    return [sample for part in parts for sample in shards.read_tar(part)]


def files_of(folder: Path) -> dict[str, str]:
    """Return every file's digest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def program(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "data_prep" / "build.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


# Digits


def test_digits_keep_their_counts_and_every_class_its_share(digits_dataset, tmp_path):
    manifest = shards.read_manifest(digits_dataset)
    assert manifest.splits == {"train": 1347, "valid": 150, "test": 300}
    assert manifest.image_shape == (1, 16, 16)
    seen = []
    whole = np.bincount(
        [s.meta["label"] for split in manifest.splits for s in samples_of(digits_dataset, split)]
    )
    for split, count in manifest.splits.items():
        samples = samples_of(digits_dataset, split)
        seen += [s.meta["source"] for s in samples]
        share = np.bincount([s.meta["label"] for s in samples], minlength=10)
        assert np.abs(share - whole * count / 1797).max() <= 1
    assert len(set(seen)) == 1797


def test_digits_use_the_whole_range_and_look_like_their_originals(digits_dataset):
    from sklearn.datasets import load_digits

    originals, labels = load_digits(return_X_y=True)
    for sample in samples_of(digits_dataset, "valid")[:20]:
        place = int(sample.meta["source"].partition("#")[2])
        assert sample.meta["label"] == labels[place]
        small = sample.image[0].reshape(8, 2, 8, 2).mean(axis=(1, 3)) / 255 * 16
        assert np.corrcoef(small.ravel(), originals[place])[0, 1] > 0.9
    images = np.stack([s.image for s in samples_of(digits_dataset, "valid")])
    assert images.min() == 0
    assert images.max() > 250


# The build itself


def test_a_second_run_does_nothing(digits_dataset, tmp_path):
    out = Path(shutil.copytree(digits_dataset, tmp_path / "out"))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = build("digits", None, str(out))
    assert (again["skipped"], again["shards"], again["samples"]) == (4, 4, 1797)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_other_settings_in_the_same_place_are_refused(idx_folder, tmp_path):
    out = tmp_path / "out"
    build("mnist", str(idx_folder), str(out))
    before = files_of(out)
    with pytest.raises(UserError, match="holds mnist built with other settings: choose another"):
        build("mnist", str(idx_folder), str(out), shard_size=7)
    with pytest.raises(UserError, match="holds mnist built from other files"):
        build("mnist", str(idx_folder), str(out), name="fashion")
    labels = idx_folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(np.zeros(10, np.uint8)))
    mnist._half.cache_clear()
    with pytest.raises(UserError, match="holds mnist built from other files"):
        build("mnist", str(idx_folder), str(out))
    assert files_of(out) == before


def test_a_killed_build_goes_on_and_ends_like_an_unbroken_one(idx_folder, tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    build("mnist", str(idx_folder), str(unbroken), shard_size=4)
    plan = make_plan("mnist", str(idx_folder), str(killed), shard_size=4)
    for job in plan.jobs[:3]:
        write_shard(job)
    truncated = killed / plan.jobs[2].split / "shard-00002.tar"
    truncated.write_bytes(truncated.read_bytes()[:100])
    (killed / "train" / ".shard-00003.tar.abc").write_bytes(b"half")
    with pytest.raises(UserError, match="There is no data set"):
        shards.read_manifest(str(killed))
    with pytest.raises(UserError, match="an unfinished build with other settings"):
        build("mnist", str(idx_folder), str(killed), shard_size=5)
    result = build("mnist", str(idx_folder), str(killed), shard_size=4)
    assert (result["skipped"], result["shards"]) == (2, 10)
    assert files_of(killed) == files_of(unbroken)
    assert verify(str(killed)) == []  # the records of what was finished are gone


def test_the_manifest_is_written_last(idx_folder, tmp_path, monkeypatch):
    order = []
    write = storage.write_bytes

    def watched(uri, content):
        order.append(Path(str(uri)).name)
        write(uri, content)

    monkeypatch.setattr(storage, "write_bytes", watched)
    build("mnist", str(idx_folder), str(tmp_path / "out"), shard_size=10)
    assert order[-1] == "manifest.json"
    assert order.count("manifest.json") == 1


def test_a_shard_that_cannot_be_seen_from_here_is_told(idx_folder, tmp_path, monkeypatch):
    """As where each node of a cluster writes to a disk of its own."""
    real = build_module.write_shard

    def elsewhere(job):
        shard = real(job)
        if shard.key == "train/shard-00001.tar":
            (Path(job.out) / shard.key).unlink()
        return shard

    monkeypatch.setattr(build_module, "write_shard", elsewhere)
    with pytest.raises(UserError, match=r"has no train/shard-00001\.tar, though a worker wrote it"):
        build("mnist", str(idx_folder), str(tmp_path / "out"), shard_size=10)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.ray
def test_bytes_do_not_depend_on_the_number_of_workers(idx_folder, tmp_path, ray_cluster):
    for workers in (0, 2):
        build("mnist", str(idx_folder), str(tmp_path / str(workers)), workers, shard_size=4)
    assert files_of(tmp_path / "2") == files_of(tmp_path / "0")
    assert len(files_of(tmp_path / "0")) == 11


@pytest.mark.ray
def test_a_mistake_found_in_a_task_is_the_same_sentence(tmp_path, ray_cluster):
    folder = faces(tmp_path / "wild", size=(200, 300))
    with pytest.raises(UserError) as told:
        build("celeba", str(folder), str(tmp_path / "out"), 2)
    assert "has (200, 300) pixels instead of (178, 218)" in str(told.value)
    assert "\n" not in str(told.value)
    assert type(told.value) is UserError


@pytest.mark.ray
def test_a_cluster_that_does_not_answer_is_told_at_once(idx_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"No Ray cluster answers at RAY_ADDRESS 127\.0\.0\.1:9"):
        build("mnist", str(idx_folder), str(tmp_path / "out"), workers=2)


# IDX files


def test_mnist_is_padded_with_zeros_and_the_split_is_as_stated(idx_folder, tmp_path):
    out = str(tmp_path / "out")
    result = build("mnist", str(idx_folder), out, name="fashion")
    manifest = shards.read_manifest(out)
    assert manifest.dataset == "fashion"
    assert manifest.splits == {"train": 22, "valid": 2, "test": 10}
    assert manifest.image_shape == (1, 32, 32)
    assert (result["samples"], result["shards"], result["skipped"]) == (34, 3, 0)
    assert set(manifest.sources) == {path.name for path in idx_folder.iterdir()}
    raw = np.frombuffer(
        gzip.decompress((idx_folder / "train-images-idx3-ubyte.gz").read_bytes()),
        np.uint8,
        offset=16,
    ).reshape(24, 28, 28)
    whole = samples_of(out, "train") + samples_of(out, "valid")
    for place, sample in enumerate(whole):
        np.testing.assert_array_equal(sample.image[0, 2:30, 2:30], raw[place])
        assert sample.image.sum() == raw[place].sum(dtype=np.int64)
        assert sample.meta == {"label": place % 10, "source": f"train-images-idx3-ubyte.gz#{place}"}
    assert len({sample.key for sample in whole}) == 24


def spoil(folder: Path, name: str, content: bytes | None) -> None:
    path = folder / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    mnist._half.cache_clear()


LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (LABELS, None, r"There is no train-labels-idx1-ubyte.gz or train-labels-idx1-ubyte in "),
        (LABELS, idx(np.zeros(24, np.uint8))[:-3], "is truncated or too long: it holds 21 values"),
        (LABELS, idx(np.zeros(23, np.uint8)), "24 images, but train-labels-idx1-ubyte 23 labels"),
        (LABELS, idx(np.zeros((24, 1), np.uint8)), "no IDX file of 1 axes: it starts with 0x00000"),
        (LABELS, b"<html>", "starts with 0x3c68746d instead of 0x00000801"),
        (LABELS, b"", "is no IDX file"),
        (IMAGES, b"no gzip", "is damaged"),
        (IMAGES, gzip.compress(bytes(100_000))[:-30], "is damaged"),
        (IMAGES, gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))), "holds 0 images, but"),
        (IMAGES, gzip.compress(idx(np.zeros((24, 40, 28), np.uint8))), "larger than 32 x 32"),
    ],
)
def test_a_wrong_idx_file_is_told_in_a_sentence(idx_folder, tmp_path, name, content, sentence):
    spoil(idx_folder, name, content)
    with pytest.raises(UserError, match=sentence):
        build("mnist", str(idx_folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_empty_idx_data_set_is_told_in_a_sentence(idx_folder, tmp_path):
    spoil(idx_folder, IMAGES, gzip.compress(idx(np.zeros((0, 28, 28), np.uint8))))
    spoil(idx_folder, LABELS, idx(np.zeros(0, np.uint8)))
    with pytest.raises(UserError, match="holds an IDX file without images: nothing to build"):
        build("mnist", str(idx_folder), str(tmp_path / "out"))


def test_real_mnist_is_read(test_data):
    plan = make_plan("mnist", str(test_data / "mnist"), "unused")
    assert plan.about.splits == {"train": 55_000, "valid": 5_000, "test": 10_000}
    assert plan.about.label_names == tuple("0123456789")
    first = next(mnist.read(str(test_data / "mnist"), "train", 0, 1))
    assert first.meta["label"] == 5  # as everybody's first MNIST image


# CelebA


def test_faces_keep_the_official_split_and_their_attributes(face_folder, tmp_path):
    out = str(tmp_path / "out")
    build("celeba", str(face_folder), out)
    manifest = shards.read_manifest(out)
    assert manifest.splits == {"train": 5, "valid": 3, "test": 2}
    assert manifest.image_shape == (3, 128, 128)
    assert manifest.label_names == tuple(f"Attribute_{i}" for i in range(40))
    assert set(manifest.sources) == {path.name for path in face_folder.iterdir()}
    (sample,) = [s for s in samples_of(out, "valid") if s.key == "000007"]
    assert sample.meta["attributes"] == [0, 1, 1] + [0] * 37
    assert sample.meta["identity"] == 6
    assert sample.meta["source"] == "000007.jpg"
    with zipfile.ZipFile(face_folder / celeba.ZIP) as archive:
        jpeg = Image.open(io.BytesIO(archive.read("img_align_celeba/000007.jpg")))
    np.testing.assert_array_equal(sample.image, np.asarray(jpeg)[45:173, 25:153].transpose(2, 0, 1))
    assert data.load_split(out, "train", tmp_path / "cache").labels.shape == (5, 40)


def test_faces_can_be_cropped_wider_and_fewer(face_folder, tmp_path):
    out = str(tmp_path / "out")
    build("celeba", str(face_folder), out, crop="c178r128", limit=2)
    manifest = shards.read_manifest(out)
    assert manifest.splits == {"train": 2, "valid": 2, "test": 2}
    assert manifest.settings["crop"] == "c178r128"
    assert manifest.image_shape == (3, 128, 128)
    (face_folder / celeba.IDENTITY).unlink()
    celeba._lists.cache_clear()
    build("celeba", str(face_folder), str(tmp_path / "without"), limit=1)
    assert "identity" not in samples_of(tmp_path / "without", "test")[0].meta


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda f: (f / celeba.ZIP).unlink(), "There is no file .*img_align_celeba.zip"),
        (lambda f: (f / celeba.ATTRIBUTES).unlink(), "There is no list_attr_celeba.txt in"),
        (lambda f: (f / celeba.ZIP).write_bytes(b"PK" * 99), "img_align_celeba.zip is damaged"),
        (lambda f: edit(f / celeba.ATTRIBUTES, "10\n", "12\n"), "says 12 rows, but has 10"),
        (lambda f: edit(f / celeba.ATTRIBUTES, "10\n", "x\n"), "start with the number of its rows"),
        (lambda f: edit(f / celeba.ATTRIBUTES, "Attribute_3 ", ""), "names 39 attributes instead"),
        (
            lambda f: edit(f / celeba.ATTRIBUTES, " -1\n", " 0\n"),
            "000001.jpg in .* has not 40 value",
        ),
        (lambda f: edit(f / celeba.ATTRIBUTES, "000002.jpg", "9.jpg"), "no row for 000002.jpg"),
        (
            lambda f: edit(f / celeba.PARTITION, "000002.jpg 0", "000002.jpg 7"),
            "says '000002.jpg 7'",
        ),
        (lambda f: edit(f / celeba.PARTITION, "000002.jpg", "2.jpg"), "no image 2.jpg, which list"),
        (lambda f: (f / celeba.ATTRIBUTES).write_bytes(b"\xff"), "is no text file"),
    ],
)
def test_a_wrong_file_of_celeba_is_told_in_a_sentence(face_folder, tmp_path, spoil, sentence):
    spoil(face_folder)
    with pytest.raises(UserError, match=sentence):
        build("celeba", str(face_folder), str(tmp_path / "out"))


def test_real_faces_are_read(test_data, tmp_path):
    out = str(tmp_path / "out")
    build("celeba", str(test_data / "celeba"), out, limit=20)
    manifest = shards.read_manifest(out)
    assert manifest.splits == {"train": 20, "valid": 20, "test": 20}
    assert manifest.label_names[20] == "Male"
    assert verify(out) == []


# The command


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["mnits", "--out", "x"], "dataset is 'mnits', but must be one of digits, mnist, celeba."),
        (["digits"], "build.py needs --out, a folder or s3:// URI for the data set."),
        (
            ["digits", "--out", "x", "--source", "y"],
            "The digits come with scikit-learn: leave --so",
        ),
        (["digits", "--out", "x", "--workers", "-1"], "--workers is -1, but must be 0 or more."),
        (
            ["digits", "--out", "x", "--shard-size", "0"],
            "--shard-size is 0, but must be at least 1",
        ),
        (["mnist", "--out", "x", "--limit", "3"], "--limit means nothing for mnist: leave it out."),
        (["mnist", "--out", "x"], "mnist needs --source: the folder or s3:// URI of the four IDX "),
        (
            ["mnist", "--out", "x", "--source", "/no/where"],
            "There is no train-images-idx3-ubyte.gz",
        ),
        (
            ["celeba", "--out", "x"],
            "celeba needs --source: the folder or s3:// URI that holds img_",
        ),
        (["digits", "--out", "ftp://x"], "ftp://x has an unknown scheme: give a local path, file:"),
        (["digits", "--ouut", "x"], "There is no flag --ouut; did you mean --out?"),
    ],
)
def test_a_wrong_argument_ends_with_its_sentence(
    arguments, sentence, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    monkeypatch.setattr(sys, "argv", ["build.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        build_module.command()
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.err.startswith(sentence)
    assert said.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_program_builds_and_answers_in_json(idx_folder, tmp_path):
    out = tmp_path / "out"
    arguments = ["mnist", "--source", idx_folder, "--out", out, "--workers", "0", "--json"]
    plan = program(*arguments, "--dry-run")
    assert plan.returncode == 0
    assert json.loads(plan.stdout.splitlines()[-1])["already_built"] is False
    assert not out.exists()
    done = program(*arguments)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert set(answer) == {"manifest", "shards", "samples", "bytes", "skipped", "seconds"}
    assert answer["manifest"] == f"{out}/manifest.json"
    assert answer["samples"] == 34
    wrong = program("mnist", "--source", tmp_path, "--out", tmp_path / "other", "--workers", "0")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("There is no train-images-idx3-ubyte.gz or train-images")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.ray
def test_the_program_starts_its_own_ray(idx_folder, tmp_path):
    done = program("mnist", "--source", idx_folder, "--out", tmp_path / "out", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert verify(str(tmp_path / "out")) == []


# An object store


@pytest.mark.s3
def test_from_a_bucket_to_a_bucket_and_back(s3, idx_folder, face_folder, tmp_path):
    local = tmp_path / "local"
    build("mnist", str(idx_folder), str(local), shard_size=10)
    storage.upload_folder(idx_folder, f"{s3}/raw/digits")
    result = build("mnist", f"{s3}/raw/digits", f"{s3}/built/digits", shard_size=10)
    assert result["manifest"] == f"{s3}/built/digits/manifest.json"
    storage.download_folder(f"{s3}/built/digits", tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(local)
    assert build("mnist", f"{s3}/raw/digits", f"{s3}/built/digits", shard_size=10)["skipped"] == 5
    assert verify(f"{s3}/built/digits") == []
    ours = data.load_split(str(local), "train", tmp_path / "cache")
    theirs = data.load_split(f"{s3}/built/digits", "train", tmp_path / "cache-s3")
    np.testing.assert_array_equal(ours.images, theirs.images)
    storage.upload_folder(face_folder, f"{s3}/raw/faces")  # the zip is read in place
    build("celeba", f"{s3}/raw/faces", f"{s3}/built/faces")
    build("celeba", str(face_folder), str(tmp_path / "faces-here"))
    assert shards.read_manifest(f"{s3}/built/faces") == shards.read_manifest(
        str(tmp_path / "faces-here")
    )


@pytest.mark.ray
@pytest.mark.s3
def test_ray_tasks_write_to_the_bucket(s3, idx_folder, ray_cluster):
    build("mnist", str(idx_folder), f"{s3}/out", workers=2, shard_size=10)
    assert verify(f"{s3}/out") == []
