"""A store that is slow, busy, broken off, wrong or killed: what was asked for still comes right."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import local_cluster
import pytest
from fault_proxy import Fault, FaultProxy, Request, times
from servers import s3_server, s3_variables

from ivegan import storage
from ivegan.errors import UserError
from ivegan.storage import Unavailable, errors, objects

SMALL, IN_PARTS = 1_000, 9 << 20  # boto3 sends more than 8 MiB as several requests
STEP = 100_000


@pytest.fixture
def proxy(s3: str, s3_variables: dict[str, str]) -> Iterator[FaultProxy]:
    """Return a proxy in front of the store, in the way of all but ``behind`` from now on."""
    upstream = s3_variables["AWS_ENDPOINT_URL"]
    if not upstream.startswith("http://"):
        pytest.skip("the proxy speaks no TLS")
    with FaultProxy(upstream) as proxy, pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def behind(s3: str, s3_variables: dict[str, str]) -> Any:
    """Return a client that does not see the proxy."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", s3_variables["AWS_ENDPOINT_URL"])
        return storage.s3_client()


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let botocore send each request once, so that every fault is seen."""
    monkeypatch.setattr(objects, "ATTEMPTS", 1)


def put(client: Any, uri: str, data: bytes) -> None:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    client.put_object(Bucket=bucket, Key=key, Body=data)


def get(client: Any, uri: str) -> bytes | None:
    """Return an object that is there, without the proxy."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    found = client.list_objects_v2(Bucket=bucket, Prefix=key)
    if not found["KeyCount"]:
        return None
    return client.get_object(Bucket=bucket, Key=key)["Body"].read()


def is_get(request: Request) -> bool:
    return request.method == "GET"


def is_first_part(request: Request) -> bool:
    return is_get(request) and not request.start


def is_put(request: Request) -> bool:
    return request.method == "PUT"


def read_in_place(uri: str) -> bytes:
    with storage.open_file(uri) as file:
        file.seek(-6 * STEP, os.SEEK_END)
        return file.read(3) + file.read(6 * STEP - 10) + file.read()


@pytest.mark.parametrize("way", [storage.read_bytes, read_in_place])
def test_a_read_whose_connection_breaks_is_repeated(way, s3, proxy):
    uri, data = f"{s3}/folder/x", os.urandom(6 * STEP)
    storage.write_bytes(uri, data)
    proxy.plan = times(
        3, Fault(cut_answer=1), lambda request: is_get(request) and "/x" in request.path
    )
    assert way(uri) == data
    assert proxy.injected["cut_answer"] == 3


def test_an_object_replaced_between_two_requests_is_never_mixed(s3, proxy, behind):
    uri, new = f"{s3}/x", os.urandom(IN_PARTS)
    storage.write_bytes(uri, os.urandom(IN_PARTS))

    def plan(request: Request) -> None:
        if request.start:
            proxy.plan = lambda _: None
            put(behind, uri, new)

    proxy.plan = plan
    assert storage.read_bytes(uri) == new


def test_a_read_that_gains_nothing_ends(s3, proxy, once):
    storage.write_bytes(f"{s3}/folder/x", b"x" * SMALL)
    proxy.plan = lambda request: Fault(cut_answer=0) if "/x" in request.path else None
    with pytest.raises(Unavailable, match=f"Reading {s3}/folder/x was cut off again and again"):
        storage.read_bytes(f"{s3}/folder/x")
    assert proxy.injected["cut_answer"] == 1


def test_an_archive_replaced_while_it_is_read_in_place_is_reported(s3, proxy):
    storage.write_bytes(f"{s3}/x", os.urandom(3 << 20))
    with storage.open_file(f"{s3}/x") as file:
        file.read(10)
        storage.write_bytes(f"{s3}/x", os.urandom(3 << 20))
        file.seek(2 << 20)
        with pytest.raises(UserError, match=f"{s3}/x was replaced while it was read: begin again"):
            file.read(10)


@pytest.mark.parametrize("size", [SMALL, IN_PARTS])
def test_a_byte_that_is_wrong_on_arrival_is_noticed(size, s3, proxy, once):
    uri, data = f"{s3}/x", os.urandom(size)
    storage.write_bytes(uri, data)
    proxy.plan = times(1, Fault(corrupt_answer=size // 2), is_first_part)
    assert storage.read_bytes(uri) == data
    assert proxy.injected["corrupt_answer"] == 1
    proxy.plan = times(2, Fault(corrupt_answer=size // 2), is_first_part)
    with pytest.raises(UserError, match=f"{s3}/x is damaged") as caught:
        storage.read_bytes(uri)
    assert not isinstance(caught.value, Unavailable)  # waiting would not help
    assert proxy.injected["corrupt_answer"] == 3


@pytest.mark.parametrize(("size", "signed"), [(SMALL, True), (IN_PARTS, False)])
def test_an_upload_with_a_wrong_byte_is_never_stored(size, signed, s3, proxy, behind, tmp_path):
    if not signed:  # as over TLS: the signature leaves the body out, and our digest is all there is
        storage.s3_client().meta.config.s3 = {"payload_signing_enabled": False}
    source = tmp_path / "source"
    source.mkdir()
    uri, old, new = f"{s3}/folder/x", os.urandom(10), os.urandom(size)
    (source / "x").write_bytes(new)
    for act in (
        lambda: storage.write_bytes(uri, new),
        lambda: storage.upload_folder(source, f"{s3}/folder"),
    ):
        proxy.plan = times(1, Fault(corrupt_request=size // 20), is_put)
        with pytest.raises(Unavailable, match=rf"{uri} was changed on its way to http"):
            act()
        assert get(behind, uri) is None
    assert proxy.injected["corrupt_request"] == 2
    put(behind, uri, old)
    proxy.plan = times(1, Fault(corrupt_request=size // 20), is_put)
    with pytest.raises(Unavailable):
        storage.write_bytes(uri, new)
    assert get(behind, uri) == old
    proxy.plan = times(1, Fault(corrupt_request=size // 20), is_put)
    storage.patiently(storage.write_bytes, uri, new)
    assert get(behind, uri) == new
    assert proxy.injected["corrupt_request"] == 4
    hidden = [r.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD" for r in proxy.asked("PUT")]
    assert any(hidden) is not signed
    assert all("x-amz-checksum-sha256" in r.headers for r in proxy.asked("PUT"))


@pytest.mark.parametrize("fault", [Fault(refuse="SlowDown"), Fault(drop=True)], ids=["busy", "off"])
def test_a_store_that_stays_away_is_unavailable_to_all(fault, s3, proxy, once, tmp_path):
    uri = f"{s3}/folder/x"
    (tmp_path / "x").touch()
    proxy.plan = lambda _: fault
    for act in (
        lambda: storage.exists(uri),
        lambda: storage.read_bytes(uri),
        lambda: storage.open_file(uri),
        lambda: storage.write_bytes(uri, b""),
        lambda: storage.list_names(s3),
        lambda: storage.upload_folder(tmp_path, f"{s3}/folder"),
        lambda: storage.delete_folder(f"{s3}/folder"),
    ):
        with pytest.raises(Unavailable, match=r"does not answer for|cannot serve .* now \("):
            act()
    assert sum(proxy.injected.values()) == 7


def test_a_store_that_is_killed_and_comes_back_is_waited_for(tmp_path, monkeypatch, caplog, once):
    monkeypatch.setattr(errors, "LONGEST_PAUSE", 0.5)
    contents = {f"s3://bucket/{n}": os.urandom(SMALL) for n in range(5)}
    with s3_server(tmp_path) as cluster, FaultProxy(cluster.url("s3")) as at:
        variables = s3_variables(cluster) | {"AWS_ENDPOINT_URL": at.endpoint}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        storage.s3_client().create_bucket(Bucket="bucket")
        for uri, content in contents.items():
            storage.write_bytes(uri, content)
        asked, asked_in_vain = 0, threading.Event()

        def plan(request: Request) -> None:
            nonlocal asked
            asked += 1
            if asked == 2:
                local_cluster.end(cluster, "s3", kill=True)
            if asked == 4:
                asked_in_vain.set()

        at.plan = plan
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(
                lambda: {uri: storage.patiently(storage.read_bytes, uri) for uri in contents}
            )
            assert asked_in_vain.wait(60)
            local_cluster.start_s3(cluster)
            assert read.result(120) == contents
    assert "does not answer for s3://bucket/" in caplog.text
    assert "Trying again: failure 2." in caplog.text
