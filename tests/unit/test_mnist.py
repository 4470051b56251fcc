"""IDX files are read or refused, and fetched from mirrors that may lie."""

import functools
import gzip
import hashlib
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import Mirror, files_of, idx

from data_prep import mnist
from data_prep.build import Build, main
from data_prep.building import build
from ivegan.data.manifest import read_manifest
from ivegan.errors import UserError

LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte.gz"
zipped = functools.partial(gzip.compress, mtime=0)  # in names of tests, so always the same bytes


# Reading


def test_mnist_is_padded_with_zeros_and_the_split_is_as_stated(idx_folder, tmp_path):
    out = str(tmp_path / "out")
    result = build("mnist", str(idx_folder), out, name="fashion")
    manifest = read_manifest(out)
    assert manifest.dataset == "fashion"
    assert manifest.splits == {"train": 22, "valid": 2, "test": 10}
    assert manifest.image_shape == (1, 32, 32)
    assert set(result) == {"manifest", "shards", "samples", "bytes", "skipped", "seconds"}
    assert (result["samples"], result["shards"], result["skipped"]) == (34, 3, 0)
    assert set(manifest.sources) == {path.name for path in idx_folder.iterdir()}
    raw = np.frombuffer(
        gzip.decompress((idx_folder / IMAGES).read_bytes()), np.uint8, offset=16
    ).reshape(24, 28, 28)
    whole = [
        sample
        for split, count in (("train", 22), ("valid", 2))
        for sample in mnist.read(str(idx_folder), split, 0, count)
    ]
    for place, sample in enumerate(whole):
        np.testing.assert_array_equal(sample.image[0, 2:30, 2:30], raw[place])
        assert sample.image.sum() == raw[place].sum(dtype=np.int64)
        assert sample.meta == {"label": place % 10, "source": f"{IMAGES}#{place}"}
    assert len({sample.key for sample in whole}) == 24


SOME = zipped(idx(np.zeros((24, 28, 28), np.uint8)))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (LABELS, None, r"There is no train-labels-idx1-ubyte.gz or train-labels-idx1-ubyte in "),
        (LABELS, idx(np.zeros(21, np.uint8), (24,)), "too long: it holds 21 values instead of 24"),
        (LABELS, idx(np.zeros(23, np.uint8)), "24 images, but train-labels-idx1-ubyte 23 labels"),
        (LABELS, b"<html>not found", "starts with 0x3c68746d instead of 0x00000801"),
        (LABELS, idx(np.zeros(0, np.uint8), (2**32 - 1,)), "claims to hold 4,294,967,295 values"),
        (IMAGES, SOME[:-8] + bytes(8), r"is damaged \(CRC check failed"),
        (IMAGES, zipped(idx(np.zeros((24, 28, 0), np.uint8))), "have 28 x 0 pixels instead"),
        (IMAGES, zipped(idx(np.zeros((0, 28, 28), np.uint8))), "0 images, but "),
    ],
)
def test_a_wrong_idx_file_is_reported_in_a_sentence(idx_folder, name, content, sentence):
    mnist.describe(str(idx_folder), "mnist")
    (idx_folder / name).unlink()
    if content is not None:
        (idx_folder / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as error:
        mnist.describe(str(idx_folder), "mnist")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("promised", "sentence"),
    [
        (24, "holds more than 18816 values instead of 18816"),
        (130_000, r"claims to hold 101,920,000 values in \d+,\d+ bytes: download"),
    ],
)
def test_a_small_file_is_not_unpacked_to_a_large_one(idx_folder, promised, sentence):
    bomb = idx(np.zeros((promised, 28, 28), np.uint8)) + bytes(100 << 20)
    (idx_folder / IMAGES).write_bytes(gzip.compress(bomb, 1))
    del bomb
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=sentence):
            mnist.describe(str(idx_folder), "mnist")
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_real_mnist_is_read(test_data):
    folder = test_data / "mnist"
    about = mnist.describe(str(folder), "mnist")
    assert about.splits == {"train": 55_000, "valid": 5_000, "test": 10_000}
    assert about.label_names == tuple("0123456789")
    first = next(mnist.read(str(folder), "train", 0, 1))
    assert first.meta["label"] == 5  # as everybody's first MNIST image
    for name, md5 in mnist.MD5.items():
        assert hashlib.md5((folder / name).read_bytes()).hexdigest() == md5


# Downloading


@pytest.fixture
def mirrors(idx_folder: Path, tmp_path: Path, monkeypatch) -> Iterator[list[Mirror]]:
    """Return two servers of the same four files, which count as the published ones."""
    for path in idx_folder.iterdir():
        if path.suffix != ".gz":
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    other = Path(shutil.copytree(idx_folder, tmp_path / "other"))
    sums = {name: hashlib.md5(data).hexdigest() for name, data in files_of(other).items()}
    monkeypatch.setattr(mnist, "MD5", sums)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = [Mirror(idx_folder), Mirror(other)]
    monkeypatch.setattr(mnist, "MIRRORS", [server.url for server in servers])
    yield servers
    for server in servers:
        server.close()


LABELS_GZ = LABELS + ".gz"
OTHER = zipped(idx(np.arange(24, dtype=np.uint8)))


def test_the_files_are_fetched_once_beside_the_data_set(mirrors, tmp_path):
    assert mnist.fetched("folder", "x") == "folder"
    to = mnist.fetched("download", str(tmp_path / "out"))
    assert to == str(tmp_path / "out-raw")
    assert files_of(Path(to)) == files_of(mirrors[0].folder)
    assert mnist.describe(to, "mnist").splits == {"train": 22, "valid": 2, "test": 10}
    (Path(to) / LABELS_GZ).write_bytes(b"damaged since")
    mnist.fetched("download", f"{tmp_path}/out/")
    assert files_of(Path(to)) == files_of(mirrors[0].folder)
    assert sorted(mirrors[0].asked) == sorted([*mnist.MD5, LABELS_GZ])
    assert mirrors[1].asked == []


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "HTTP Error 404"), (OTHER[:-1], "is damaged"), (OTHER, "another md5 than published")],
)
def test_what_one_mirror_does_not_give_comes_from_the_next(mirrors, tmp_path, content, sentence):
    def spoil(server: Mirror) -> None:
        (server.folder / LABELS_GZ).unlink()
        if content is not None:
            (server.folder / LABELS_GZ).write_bytes(content)

    spoil(mirrors[0])
    mnist.download(str(tmp_path / "good"), mnist.MIRRORS)
    assert files_of(tmp_path / "good") == files_of(mirrors[1].folder)
    assert mirrors[1].asked == [LABELS_GZ]
    spoil(mirrors[1])
    with pytest.raises(UserError, match=sentence) as error:
        mnist.download(str(tmp_path / "bad"), mnist.MIRRORS)
    assert str(error.value).startswith(f"{LABELS_GZ} cannot be downloaded ({mirrors[0].url}/")
    assert f"; {mirrors[1].url}/" in str(error.value)
    assert "\n" not in str(error.value)
    assert set(files_of(tmp_path / "bad")) == {IMAGES}  # nothing of the file that was wrong


def test_another_data_set_needs_no_published_check_sums_but_good_files(mirrors, tmp_path):
    server, out = mirrors[0], str(tmp_path / "out")
    mnist.fetched("download", out)
    (server.folder / LABELS_GZ).write_bytes(OTHER)
    to = mnist.fetched(f"{server.url}/", out)  # existing files may be another data set's
    assert files_of(Path(to)) == files_of(server.folder)
    images = (server.folder / IMAGES).read_bytes()
    for content, sentence in ((OTHER[:-1], "is damaged"), (images, "is no IDX file of 1 axes")):
        (server.folder / LABELS_GZ).write_bytes(content)
        with pytest.raises(UserError, match=rf"{LABELS_GZ} cannot be downloaded \(.*{sentence}"):
            mnist.fetched(server.url, out)


def test_a_build_downloads_its_source_once(mirrors, tmp_path, capsys):
    url, out = mirrors[0].url, str(tmp_path / "set")
    options = Build(dataset="mnist", source=url, out=out, workers=0, dry_run=True)
    assert main(options) == {"source": url, "out": out}
    assert f"{url} would first be downloaded to {out}-raw" in capsys.readouterr().out
    assert not (tmp_path / "set-raw").exists()
    assert build("mnist", url, out)["samples"] == 34
    for source in (url, f"{out}-raw"):
        assert build("mnist", source, out)["skipped"] == 3


LAYOUTS = {
    "a dot for a hyphen": "{half}-{kind}.idx{axes}-ubyte",
    "a folder around each file": "{half}-{kind}-idx{axes}-ubyte/{half}-{kind}-idx{axes}-ubyte",
    "torchvision": "MNIST/raw/{half}-{kind}-idx{axes}-ubyte",
    "EMNIST": "gzip/emnist-letters-{other}-{kind}-idx{axes}-ubyte",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_public_copies_are_read_whatever_their_names(layout, idx_folder, tmp_path):
    images = [s.image for s in mnist.read(str(idx_folder), "test", 0, 3)]
    for path in list(idx_folder.iterdir()):
        half, kind, axes, _ = path.name.replace(".gz", "").split("-")
        other = half.replace("t10k", "test")
        name = layout.format(half=half, kind=kind, axes=axes[-1], other=other)
        target = tmp_path / "copy" / (name + path.suffix)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        (target.parent / f"._{target.name}").write_bytes(b"macOS")
    source = str(tmp_path / "copy")
    assert mnist.describe(source, "mnist").splits == mnist.describe(str(idx_folder), "mnist").splits
    found = [s.image for s in mnist.read(source, "test", 0, 3)]
    np.testing.assert_array_equal(found, images)


def several(folder: Path) -> None:
    for path in list(folder.iterdir()):
        for name in ("letters", "digits"):
            path.with_name(f"emnist-{name}-{path.name}").write_bytes(path.read_bytes())
        path.unlink()


def misspelt(folder: Path) -> None:
    (path,) = folder.glob("train-images*")
    path.rename(path.with_name("train-imges-idx3-ubyte.gz"))


def beside_fashion(folder: Path) -> None:
    """Fill it like torchvision's folder of data sets."""
    paths = list(folder.iterdir())
    for name in ("MNIST/raw", "FashionMNIST/raw"):
        shutil.copytree(folder, folder / name, ignore=lambda *_: ["MNIST"])
    for path in paths:
        path.unlink()


def packed(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "mnist.zip").write_bytes(b"PK")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (several, "holds several data sets"),
        (beside_fashion, "holds several data sets, FashionMNIST/raw"),
        (misspelt, r"nearest file there is train-imges-idx3-ubyte\.gz"),
        (packed, r"\(mnist\.zip is there: unpack it\)"),
    ],
)
def test_a_folder_without_the_files_says_what_is_there(idx_folder, change, sentence):
    change(idx_folder)
    with pytest.raises(UserError, match=sentence):
        mnist.describe(str(idx_folder), "mnist")
    file = idx_folder / "file.zip"
    file.touch()
    with pytest.raises(UserError, match=r"file\.zip is one file: unpack it"):
        mnist.describe(str(file), "mnist")


def test_labels_are_counted_from_the_lowest(idx_folder):
    for path in idx_folder.glob("*labels*"):
        zipped = path.suffix == ".gz"
        raw = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
        raw = raw[:8] + bytes(value + 5 for value in raw[8:])
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    before = mnist.describe(str(idx_folder), "mnist").label_names
    labels = [s.meta["label"] for s in mnist.read(str(idx_folder), "train", 0, 9)]
    assert int(before[0]) >= 5
    assert 0 <= min(labels) < max(labels) < len(before)
