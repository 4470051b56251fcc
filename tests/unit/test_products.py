"""What a build leaves for people, and who may write where."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import files_of
from PIL import Image

from data_prep import building
from data_prep.building import build
from data_prep.products import Written, table
from data_prep.verify import verify
from ivegan import storage
from ivegan.data.cache import load_split
from ivegan.data.manifest import SPLITS, Shard, read_manifest
from ivegan.data.tars import Row, decode
from ivegan.errors import UserError


def test_the_table_leads_to_every_image_and_contact_sheets_show_some(digits_dataset, tmp_path):
    table = pq.read_table(f"{digits_dataset}/samples.parquet").to_pylist()
    manifest = read_manifest(digits_dataset)
    assert len(table) == 1797
    assert set(table[0]) == {"key", "split", "shard", "offset", "bytes", "label", "source"}
    for split in SPLITS:
        with Image.open(f"{digits_dataset}/contact-{split}.png") as sheet:
            assert sheet.width > 600
            assert np.asarray(sheet).std() > 20
        rows = [row for row in table if row["split"] == split]
        whole = load_split(digits_dataset, split, tmp_path)
        assert [row["key"] for row in rows] == list(whole.keys)
        assert [row["label"] for row in rows] == whole.labels.tolist()
        assert {row["shard"] for row in rows} == {s.key for s in manifest.of_split(split)}
        for place in (0, len(rows) // 2, len(rows) - 1):
            row = rows[place]
            shard = Path(digits_dataset, row["shard"]).read_bytes()
            image = decode(shard[row["offset"] : row["offset"] + row["bytes"]])
            np.testing.assert_array_equal(image, whole.images[place])


def test_equal_builds_at_once_end_as_one(tmp_path):
    build("digits", None, str(tmp_path / "alone"), shard_size=200)

    def shared(_: int) -> dict:
        return build("digits", None, str(tmp_path / "shared"), shard_size=200)

    with ThreadPoolExecutor(3) as pool:
        assert {result["samples"] for result in pool.map(shared, range(3))} == {1797}
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "alone")


def test_a_build_that_an_equal_one_overtakes_ends_with_its_manifest(tmp_path, monkeypatch):
    """The other ends between two shards of this one, and clears the folder of records away."""
    out, write = str(tmp_path / "set"), building.write_shard

    def overtaken(plan, job):
        monkeypatch.setattr(building, "write_shard", write)
        build("digits", None, out)
        raise UserError(f"There is no file {plan.record(job)}: correct the path.")

    monkeypatch.setattr(building, "write_shard", overtaken)
    assert build("digits", None, out)["samples"] == 1797
    assert verify(out) == []


def test_what_a_killed_run_left_beside_a_manifest_is_cleared_away(tmp_path):
    out = tmp_path / "set"
    build("digits", None, str(out))
    storage.write_bytes(str(out / ".unfinished" / "train-00000.json"), b"{}")
    assert verify(str(out)) == [".unfinished/train-00000.json does not belong to the data set."]
    assert build("digits", None, str(out))["skipped"] == 4
    assert verify(str(out)) == []


def test_attributes_become_columns():
    written = [
        Written(
            shard=Shard(split="train", key=f"k{i}", samples=1, bytes=1, sha256=""),
            rows=[Row(str(i), {"attributes": [i, 1], "identity": 7 + i, "source": "x"}, 512, 9)],
        )
        for i in range(2)
    ]
    rows = pq.read_table(io.BytesIO(table(written, ("Bald", "Smiling")))).to_pylist()
    assert [row["Bald"] for row in rows] == [False, True]
    assert [row["Smiling"] for row in rows] == [True, True]
    assert [row["identity"] for row in rows] == [7, 8]
