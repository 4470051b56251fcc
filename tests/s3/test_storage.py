"""One set of names for files here and in an object store; nothing is ever half there."""

import errno
import functools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore import exceptions as aws

from ivegan import storage
from ivegan.errors import UserError
from ivegan.storage import errors, objects


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> str:
    """Return an empty folder of each kind: the tests below hold for both."""
    return str(tmp_path / "place") if request.param == "local" else request.getfixturevalue("s3")


FILES = {"weights.bin": b"w" * 100, "config.json": b"{}", "deep/er/x.txt": b"x"}


def test_what_is_written_is_read(place):
    uri = storage.join(place, "run-10/b/c.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"one")
    storage.write_bytes(uri, b"two")
    assert storage.read_bytes(uri) == b"two"
    assert storage.exists(uri)
    assert storage.exists(storage.join(place, "run-10"))
    # A name that starts alike is another folder.
    assert not storage.exists(storage.join(place, "run-1"))
    assert storage.list_names(storage.join(place, "run-1")) == []
    storage.delete_folder(storage.join(place, "run-1"))
    assert storage.list_files(place) == {"run-10/b/c.bin": 3}


def test_lists_are_direct_children_or_all_files(place):
    assert storage.list_files(place) == {}
    for name in ("b/2", "b/1", "a", "b/deep/3"):
        storage.write_bytes(storage.join(place, name), name.encode())
    assert storage.list_names(place) == ["a", "b"]
    assert storage.list_names(storage.join(place, "b")) == ["1", "2", "deep"]
    assert storage.list_names(storage.join(place, "nowhere")) == []
    assert storage.list_files(place) == {"a": 1, "b/1": 3, "b/2": 3, "b/deep/3": 8}
    if not storage.is_local(place):
        bucket, _, key = place.removeprefix("s3://").partition("/")
        storage.s3_client().put_object(
            Bucket=bucket, Key=f"{key}/c/".lstrip("/")
        )  # a console's folder
        assert storage.list_names(place) == ["a", "b", "c"]
        assert "c/" not in storage.list_files(place)


def test_a_file_can_be_read_in_place(place):
    uri = storage.join(place, "big")
    content = bytes(range(256)) * 20_000
    storage.write_bytes(uri, content)
    with storage.open_file(uri) as file:
        file.seek(3_000_000)
        assert file.read(5) == content[3_000_000:3_000_005]
        file.seek(-7, os.SEEK_END)
        assert file.read() == content[-7:]


def test_what_is_created_first_stands(place):
    uri = storage.join(place, "a/b")
    assert storage.create_bytes(uri, b"first") == b"first"
    assert storage.create_bytes(uri, b"second") == b"first"
    storage.write_bytes(uri, b"third")
    assert storage.create_bytes(uri, b"second") == b"third"
    assert storage.list_names(storage.join(place, "a")) == ["b"]


def test_without_hard_links_a_file_is_created_all_the_same(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert storage.create_bytes(tmp_path / "x", b"first") == b"first"
    assert storage.create_bytes(tmp_path / "x", b"second") == b"first"
    assert storage.list_names(tmp_path) == ["x"]


def test_of_many_who_create_a_local_file_at_once_all_get_the_same(tmp_path):
    contents = [bytes([n]) * 100_000 for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for uri in (tmp_path / str(number) for number in range(10)):
            (content,) = set(pool.map(functools.partial(storage.create_bytes, uri), contents))
            assert content == uri.read_bytes()
    assert len(storage.list_names(tmp_path)) == 10  # no temporary names stay behind


def test_folders_appear_whole(place):
    uri = storage.join(place, "checkpoint")
    storage.write_folder(uri, FILES, last="config.json")
    assert {n: storage.read_bytes(f"{uri}/{n}") for n in storage.list_files(uri)} == FILES
    assert storage.list_names(place) == ["checkpoint"]  # no temporary names stay behind
    storage.write_folder(uri, {"config.json": b"2"}, last="config.json")
    assert storage.list_files(uri) == {"config.json": 1}
    storage.delete_folder(uri, first="config.json")
    assert not storage.exists(uri)
    storage.delete_folder(uri)


def test_the_marker_goes_up_last_and_comes_down_first(s3, monkeypatch):
    calls: list[str] = []
    client = storage.s3_client()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(client, name)

        def upload_fileobj(self, body, bucket, key, **more):
            calls.append(f"up {key}")
            client.upload_fileobj(body, bucket, key, **more)

        def delete_objects(self, *, Bucket, Delete):
            calls.append("down " + " ".join(one["Key"] for one in Delete["Objects"]))
            return client.delete_objects(Bucket=Bucket, Delete=Delete)

    monkeypatch.setattr(objects, "s3_client", Watched)
    storage.write_folder(f"{s3}/c", FILES, last="config.json")
    storage.write_folder(f"{s3}/c", FILES, last="config.json")
    first = ["up c/deep/er/x.txt", "up c/weights.bin", "up c/config.json"]
    second = ["down c/config.json", "down c/deep/er/x.txt c/weights.bin"]
    assert calls == [*first, *second, *first]


def test_a_disk_that_refuses_is_reported_in_a_sentence(tmp_path, monkeypatch):
    uri, target = tmp_path / "x", tmp_path / "target"
    storage.write_bytes(uri, b"old")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", refuse)
    for act, named in (
        (lambda: storage.write_bytes(uri, b"new"), uri),
        (lambda: storage.write_folder(target, FILES, last="config.json"), target),
    ):
        with pytest.raises(UserError) as caught:
            act()
        sentence = f"No space is left for {named}: free some, or choose another place."
        assert str(caught.value) == sentence
        assert storage.list_files(tmp_path) == {"x": 3}
    assert storage.read_bytes(uri) == b"old"


def test_a_list_leaves_out_what_goes_while_it_is_made(tmp_path, monkeypatch):
    (tmp_path / "stays").write_bytes(b"1")
    monkeypatch.setattr("os.walk", lambda *_, **__: [(str(tmp_path), [], ["stays", "gone"])])
    assert storage.list_files(tmp_path) == {"stays": 1}


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("InternalError", 500, storage.Unavailable),
        ("RequestTimeout", 400, storage.Unavailable),
        ("429", 429, storage.Unavailable),
        ("ExpiredToken", 400, UserError),
    ],
)
def test_refusals_are_distinguished(code, status, kind):
    answer = {
        "Error": {"Code": code, "Message": "It is so."},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    caught = errors.refusal(answer, "s3://bucket/x", "http://store")
    assert type(caught) is kind
    assert "s3://bucket/x" in str(caught)
    assert "http://store" in str(caught)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (aws.SSLError(endpoint_url="x", error="y"), "is not trusted: set AWS_CA_BUNDLE"),
        (aws.ProxyConnectionError(proxy_url="http://p:1"), "The proxy on the way to http://s:1 do"),
        (aws.CredentialRetrievalError(provider="role", error_msg="no"), "cannot be asked for"),
    ],
)
def test_other_errors_of_the_client_are_sentences(error, sentence, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s:1")
    with pytest.raises(UserError, match=sentence), errors.sentences("s3://bucket/x"):
        raise error


def test_a_missing_file_is_reported_in_a_sentence(place):
    uri = storage.join(place, "nothing")
    with pytest.raises(UserError, match=rf"There is no file {uri}: correct the"):
        storage.read_bytes(uri)
    with pytest.raises(UserError, match=rf"There is no file {uri}: correct the"):
        storage.open_file(uri)


def test_uris_are_made_absolute_and_joined(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x/") == f"{tmp_path}/runs/x"
    assert storage.absolute(tmp_path / "y") == f"{tmp_path}/y"
    assert storage.absolute(f"file://{tmp_path}/a%20b") == f"{tmp_path}/a b"
    assert storage.absolute("s3://bucket/key/") == "s3://bucket/key"
    assert storage.absolute("s3://bucket") == "s3://bucket"
    assert storage.join("s3://bucket/", "/a/", "b") == "s3://bucket/a/b"
    assert storage.is_local("a") and not storage.is_local("s3://bucket/a")  # noqa: PT018


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("gs://bucket/x", "gs://bucket/x has an unknown scheme: give a local path, file:// or s3:"),
        ("s3:///x", "s3:///x names no bucket that can be: write s3://BUCKET/KEY"),
        ("s3://my bucket/x", "s3://my bucket/x names no bucket that can be: "),
        ("s3://id:key@bucket/x", "s3://bucket/x names no bucket that can be: "),
        ("", "An empty path was given: name a folder or an s3:// URI."),
    ],
)
def test_a_wrong_uri_is_reported_in_a_sentence(uri, sentence):
    with pytest.raises(UserError) as caught:
        storage.read_bytes(uri)
    assert str(caught.value).startswith(sentence)


def test_a_wrong_path_is_reported_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is too long: choose a shorter one"):
        storage.write_bytes(tmp_path / ("n" * 300), b"")
    with pytest.raises(UserError, match="a file stands in its way"):
        storage.write_bytes(tmp_path / "file" / "below", b"")
    with pytest.raises(UserError, match="is a folder where a file is expected"):
        storage.read_bytes(tmp_path)


def test_a_missing_bucket_is_named(s3):
    for act in (
        storage.read_bytes,
        storage.open_file,
        storage.exists,
        storage.list_names,
        storage.delete_folder,
        lambda uri: storage.write_bytes(uri, b""),
    ):
        with pytest.raises(UserError, match="There is no bucket 'nowhere-at-all' at http"):
            act("s3://nowhere-at-all/x")


def test_wrong_credentials_are_reported_and_missing_ones_too(s3, monkeypatch):
    with monkeypatch.context() as with_wrong:
        with_wrong.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        for act in (storage.read_bytes, storage.exists, storage.list_names):
            with pytest.raises(UserError, match="was denied: check AWS_ACCESS_KEY_ID"):
                act(f"{s3}/x")
        with pytest.raises(UserError, match="was denied: check AWS_ACCESS_KEY_ID"):
            storage.write_bytes(f"{s3}/x", b"")
    with monkeypatch.context() as without:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            without.delenv(name)
        without.setenv("AWS_EC2_METADATA_DISABLED", "true")
        without.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        without.setenv("AWS_CONFIG_FILE", os.devnull)
        with pytest.raises(UserError, match="There are no credentials"):
            storage.read_bytes(f"{s3}/x")
