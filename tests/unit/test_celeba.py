"""Faces from a zip or a folder become the same samples, or one sentence says why not."""

import io
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import write_faces
from PIL import Image

from data_prep import celeba
from data_prep.building import build
from data_prep.verify import verify
from ivegan import storage
from ivegan.data.cache import load_split
from ivegan.data.manifest import read_manifest
from ivegan.data.tars import write_tar
from ivegan.errors import UserError

ATTRIBUTES, PARTITION, IDENTITY = celeba.ATTRIBUTES, celeba.PARTITION, celeba.IDENTITY
FIRST = "img_align_celeba/000001.jpg"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def unzip(folder: Path, to: str = "") -> Path:
    """Put the images into a folder, in place of the zip."""
    with zipfile.ZipFile(folder / celeba.ZIP) as archive:
        for name in archive.namelist()[1:]:
            path = folder / to / Path(name).name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(archive.read(name))
    (folder / celeba.ZIP).unlink()
    return folder


def rezip(folder: Path, changes: dict[str, bytes | None], method: int = zipfile.ZIP_STORED) -> None:
    """Write the zip again with other members; None leaves one out."""
    with zipfile.ZipFile(folder / celeba.ZIP) as archive:
        members: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / celeba.ZIP, "w", method) as archive:
        for name, content in (members | changes).items():
            if content is not None:
                archive.writestr(name, content)


def patch(folder: Path, offset: int, value: bytes) -> None:
    """Change what the zip's directory says of the first image."""
    path = folder / celeba.ZIP
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(FIRST.encode()))
    content[entry + offset : entry + offset + len(value)] = value
    path.write_bytes(content)


def flip(folder: Path, word: bytes) -> None:
    """Change the first such word in the zip."""
    path = folder / celeba.ZIP
    path.write_bytes(path.read_bytes().replace(word, word.lower(), 1))


def jpeg(size: tuple[int, int] = (178, 218), kind: str = "jpeg") -> bytes:
    into = io.BytesIO()
    Image.new("RGB", size).save(into, kind)
    return into.getvalue()


def claiming(width: int, height: int) -> bytes:
    """Return a JPEG of the right size whose header says another."""
    content = bytearray(jpeg())
    frame = content.index(b"\xff\xc0") + 5
    content[frame : frame + 4] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(content)


def tar(folder: Path | str, split: str = "train", stop: int = 5, **options: Any) -> bytes:
    """Return a shard."""
    return write_tar(celeba.read(str(folder), split, 0, stop, **options))[0]


# What comes out


def test_faces_keep_the_official_split_and_their_attributes(face_folder, tmp_path):
    out = str(tmp_path / "out")
    build("celeba", str(face_folder), out)
    manifest = read_manifest(out)
    assert manifest.splits == {"train": 5, "valid": 3, "test": 2}
    assert manifest.image_shape == (3, 128, 128)
    assert manifest.label_names == tuple(f"Attribute_{i}" for i in range(40))
    assert set(manifest.sources) == {path.name for path in face_folder.iterdir()}
    sample = list(celeba.read(str(face_folder), "valid", 0, 3))[1]
    assert sample.key == "000007"
    assert sample.meta == {
        "attributes": [0, 1, 1] + [0] * 37,
        "identity": 6,
        "source": "000007.jpg",
    }
    with zipfile.ZipFile(face_folder / celeba.ZIP) as archive:
        image = Image.open(io.BytesIO(archive.read("img_align_celeba/000007.jpg")))
    np.testing.assert_array_equal(
        sample.image, np.asarray(image)[45:173, 25:153].transpose(2, 0, 1)
    )
    assert load_split(out, "train", tmp_path / "cache").labels.shape == (5, 40)


def test_faces_can_be_cropped_wider_and_fewer(face_folder):
    about = celeba.describe(str(face_folder), "celeba", crop="c178r128", limit=2)
    assert about.splits == {"train": 2, "valid": 2, "test": 2}
    assert about.settings["crop"] == "c178r128"
    assert about.image_shape == (3, 128, 128)
    wide = list(celeba.read(str(face_folder), "train", 0, 9, crop="c178r128", limit=2))
    assert [sample.image.shape for sample in wide] == [(3, 128, 128)] * 2
    (face_folder / IDENTITY).unlink()
    celeba.describe(str(face_folder), "celeba")
    assert "identity" not in next(celeba.read(str(face_folder), "test", 0, 1)).meta


def test_resizing_is_antialiased():
    into = io.BytesIO()
    stripes = np.zeros((218, 178), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(into, "jpeg", quality=100)
    # Stripes finer than the new pixels: a filter that looks at two neighbours leaves 74.
    assert celeba.cut(into.getvalue(), "c128").std() > 120
    assert celeba.cut(into.getvalue(), "c178r128").std() < 40


@pytest.mark.parametrize("to", ["img_align_celeba", ""])
def test_a_folder_gives_the_samples_of_the_zip(tmp_path, to):
    zipped = write_faces(tmp_path / "zip")
    wanted = celeba.describe(str(zipped), "celeba"), tar(zipped), tar(zipped, "test", 2)
    folder = unzip(zipped.rename(tmp_path / "folder"), to)
    (folder / to / "below").mkdir()
    (folder / to / "below" / "other.jpg").touch()
    about = celeba.describe(str(folder), "celeba")
    assert (tar(folder), tar(folder, "test", 2)) == wanted[1:]
    assert about.splits == wanted[0].splits
    (images,) = set(about.sources) - {ATTRIBUTES, PARTITION, IDENTITY}
    assert images == "img_align_celeba, names and sizes of 10 files"
    with (folder / to / "000003.jpg").open("ab") as file:
        file.write(b"\0")
    assert celeba.describe(str(folder), "celeba").sources[images] != about.sources[images]


# What is wrong


SPOILT: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / ATTRIBUTES).unlink(), "There is no list_attr_celeba.txt in .*faces .*: it"),
    (lambda f: (f / IDENTITY).write_bytes(b"\xc3\xa9"), f"{IDENTITY} is no text file"),
    (lambda f: edit(f / ATTRIBUTES, "10\n", "12\n"), "but has 10 rows of them below '12'"),
    (lambda f: edit(f / ATTRIBUTES, "_3 ", "_4 "), "names 39 attributes instead of 40"),
    (lambda f: edit(f / ATTRIBUTES, " -1\n", " 0\n"), "row of 000001.jpg in .* has not 40 values"),
    (lambda f: edit(f / ATTRIBUTES, "000003", "000002"), "has '000002.jpg' in row 3, where the"),
    (lambda f: edit(f / ATTRIBUTES, "000002", "../2"), r"has '../2.jpg' in row 2, where the name"),
    (lambda f: edit(f / PARTITION, "000010.jpg 2\n", ""), "has the row '' where '000010.jpg'"),
    (lambda f: edit(f / PARTITION, "000002.jpg 0", "000002.jpg 7"), "row '000002.jpg 7' where"),
    (lambda f: edit(f / PARTITION, "000010.jpg 2", "000010.jpg 2\nx 1"), "row 'x 1' where 'no im"),
    (lambda f: edit(f / IDENTITY, "000009.jpg 8", "000009.jpg x"), f"{IDENTITY} has the row '00"),
    (lambda f: (f / celeba.ZIP).unlink(), "There is no img_align_celeba.zip and there are no JPEG"),
    (lambda f: (f / celeba.ZIP).write_bytes(b"PK" * 99), "img_align_celeba.zip is damaged"),
    (lambda f: rezip(f, {FIRST: None}), "zip has no image 000001.jpg, which list_eval_partition"),
    (lambda f: rezip(f, {"x/0.JPG": b""}), "zip has an image '0.JPG', which list_eval_partition"),
    (lambda f: rezip(f, {"x/000001.jpg": b""}), "zip holds two images named '000001.jpg'"),
]


@pytest.mark.parametrize(("spoil", "sentence"), SPOILT)
def test_a_wrong_source_is_reported_before_anything_is_built(face_folder, spoil, sentence):
    spoil(face_folder)
    with pytest.raises(UserError, match=sentence) as error:
        celeba.describe(str(face_folder), "celeba", limit=1)  # whole lists are checked
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (jpeg()[:-200], "truncated"),
        (jpeg(kind="png"), "it is no JPEG"),
        (jpeg((200, 300)), r"it has \(200, 300\) pixels instead of \(178, 218\)"),
        (claiming(60_000, 60_000), "it is no JPEG of an aligned image"),  # where Pillow raises
    ],
)
def test_a_wrong_image_is_reported_with_its_name(face_folder, content, sentence):
    rezip(face_folder, {FIRST: content})
    sentence = rf"The image 000001.jpg in .*faces.* cannot be used \(.*({sentence})"
    with pytest.raises(UserError, match=sentence) as error:
        tar(face_folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: flip(f, b"JFIF"), "Bad CRC-32"),
        (lambda f: rezip(f, {FIRST: None}), "'000001.jpg'"),  # lost since the plan
    ],
)
def test_an_image_damaged_in_the_zip_is_reported(face_folder, spoil, reason):
    celeba.describe(str(face_folder), "celeba")
    spoil(face_folder)
    celeba._images.cache_clear()  # as in another process
    with pytest.raises(UserError, match=rf"image 000001.jpg in .*zip is damaged \({reason}"):
        tar(face_folder)


def test_no_more_is_inflated_than_an_image_may_have(face_folder):
    rezip(face_folder, {FIRST: bytes(100 << 20)}, zipfile.ZIP_DEFLATED)
    patch(face_folder, 24, (1000).to_bytes(4, "little"))  # what its directory promises
    celeba._images.cache_clear()
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"000001.jpg in .*zip is damaged"):
            tar(face_folder)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


# Once per process


def test_lists_and_zip_are_read_once_for_many_shards(face_folder, monkeypatch):
    celeba._lists.cache_clear()
    celeba._images.cache_clear()
    times: list[str] = []
    for name in ("read_bytes", "open_file"):
        call = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda uri, call=call: times.append(uri) or call(uri))
    for split in ("train", "valid", "train"):
        assert len(list(celeba.read(str(face_folder), split, 0, 2))) == 2
    assert len(times) == 1 + 3


def test_a_changed_source_is_described_anew(face_folder):
    before = celeba.describe(str(face_folder), "celeba")
    rezip(face_folder, {FIRST: jpeg()})
    edit(face_folder / PARTITION, "000006.jpg 1", "000006.jpg 0")
    after = celeba.describe(str(face_folder), "celeba")
    assert after.splits["train"] == 6
    assert after.sources[celeba.ZIP] != before.sources[celeba.ZIP]


# Real data, and an object store


def test_real_faces_are_read(test_data, tmp_path):
    out = str(tmp_path / "out")
    build("celeba", str(test_data / "celeba"), out, limit=20)
    manifest = read_manifest(out)
    assert manifest.splits == {"train": 20, "valid": 20, "test": 20}
    assert manifest.label_names[20] == "Male"
    assert verify(out) == []


def kaggle(folder: Path) -> None:
    """Change a release to Kaggle's layout: CSV lists, a nested folder, no identities."""
    unzip(folder, "images").joinpath("images").rename(folder / "img_align_celeba")
    (folder / "inner").mkdir()
    (folder / "img_align_celeba").rename(folder / "inner" / "img_align_celeba")
    (folder / "inner").rename(folder / "img_align_celeba")
    for name, head in ((ATTRIBUTES, None), (PARTITION, "image_id,partition")):
        rows = [",".join(row.split()) for row in (folder / name).read_text().splitlines()]
        rows = [f"image_id,{rows[1]}", *rows[2:]] if head is None else [head, *rows]
        (folder / name).with_suffix(".csv").write_text("\r\n".join(rows) + "\r\n")
        (folder / name).unlink()


def official_drive(folder: Path) -> None:
    for name, place in ((ATTRIBUTES, "Anno"), (PARTITION, "Eval"), (celeba.ZIP, "Img")):
        (folder / place).mkdir()
        (folder / name).rename(folder / place / name)


def left_by_systems(folder: Path) -> None:
    rezip(
        folder, {"__MACOSX/img_align_celeba/._000001.jpg": b"x", "img_align_celeba/Thumbs.db": b""}
    )
    (folder / ".DS_Store").write_bytes(b"")


def written_on_windows(folder: Path) -> None:
    for name in (ATTRIBUTES, PARTITION):
        rows = (folder / name).read_bytes().replace(b"\n", b"\r\n")
        (folder / name).write_bytes(b"\xef\xbb\xbf" + rows + b"\n \n")


@pytest.mark.parametrize("change", [kaggle, official_drive, left_by_systems, written_on_windows])
def test_public_copies_give_the_same_samples(change, face_folder):
    (face_folder / IDENTITY).unlink(missing_ok=True)

    def samples() -> list[tuple[str, bytes, object]]:
        splits = celeba.describe(str(face_folder), "celeba").splits
        found = [s for n, c in splits.items() for s in celeba.read(str(face_folder), n, 0, c)]
        return [(s.key, s.image.tobytes(), s.meta) for s in found]

    before = samples()
    change(face_folder)
    assert samples() == before
