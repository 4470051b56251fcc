"""Shards that Ray tasks write, here and in an object store."""

import numpy as np
import pytest
from datasets import files_of, write_faces

from data_prep.building import build
from data_prep.verify import verify
from ivegan import storage
from ivegan.data.cache import load_split
from ivegan.data.manifest import read_manifest
from ivegan.errors import UserError


def test_from_a_bucket_to_a_bucket_and_back(s3, idx_folder, face_folder, tmp_path, ray_cluster):
    """By Ray tasks, with the bytes of a plain loop from a folder to a folder."""
    local, uri = tmp_path / "local", f"{s3}/built/digits"
    build("mnist", str(idx_folder), str(local), shard_size=10)
    for folder, name in ((idx_folder, "digits"), (face_folder, "faces")):
        storage.write_folder(f"{s3}/raw/{name}", files_of(folder), last="")
    result = build("mnist", f"{s3}/raw/digits", uri, workers=2, shard_size=10)
    assert result["manifest"] == f"{uri}/manifest.json"
    back = {name: storage.read_bytes(f"{uri}/{name}") for name in storage.list_files(uri)}
    assert back == files_of(local)
    assert len(files_of(local)) == 5 + 3 + 2  # shards, contact sheets, table, manifest
    assert build("mnist", f"{s3}/raw/digits", uri, shard_size=10)["skipped"] == 5
    assert verify(uri) == []
    ours = load_split(str(local), "train", tmp_path / "cache")
    theirs = load_split(uri, "train", tmp_path / "cache-s3")
    np.testing.assert_array_equal(ours.images, theirs.images)
    build("celeba", f"{s3}/raw/faces", f"{s3}/built/faces")  # the zip is read in place
    build("celeba", str(face_folder), str(tmp_path / "faces-here"))
    assert read_manifest(f"{s3}/built/faces") == read_manifest(str(tmp_path / "faces-here"))


def test_a_mistake_found_in_a_task_is_the_same_sentence(tmp_path, ray_cluster):
    folder = write_faces(tmp_path / "wild", size=(200, 300))
    with pytest.raises(UserError) as error:
        build("celeba", str(folder), str(tmp_path / "out"), 2)
    assert "has (200, 300) pixels instead of (178, 218)" in str(error.value)
    assert "\n" not in str(error.value)
    assert type(error.value) is UserError


def test_a_cluster_that_does_not_answer_is_reported_at_once(idx_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"No Ray cluster answers at RAY_ADDRESS 127\.0\.0\.1:9"):
        build("mnist", str(idx_folder), str(tmp_path / "out"), workers=2)
