"""A store that is busy, broken off or wrong: what was asked for still comes right."""

import os
from collections.abc import Iterator

import pytest
from fault_proxy import Fault, FaultProxy, Request, times

from ivegan import storage
from ivegan.errors import UserError
from ivegan.storage import Unavailable, objects

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
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let botocore send each request once, so that every fault is seen."""
    monkeypatch.setattr(objects, "ATTEMPTS", 1)


def is_get(request: Request) -> bool:
    return request.method == "GET"


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


def test_a_byte_that_is_wrong_on_arrival_is_noticed(s3, proxy):
    uri, data = f"{s3}/x", os.urandom(SMALL)
    storage.write_bytes(uri, data)
    proxy.plan = times(1, Fault(corrupt_answer=SMALL // 2), is_get)
    assert storage.read_bytes(uri) == data
    proxy.plan = times(2, Fault(corrupt_answer=SMALL // 2), is_get)
    with pytest.raises(UserError, match=f"{s3}/x is damaged") as caught:
        storage.read_bytes(uri)
    assert not isinstance(caught.value, Unavailable)  # waiting would not help
    assert proxy.injected["corrupt_answer"] == 3


@pytest.mark.parametrize(("size", "signed"), [(SMALL, True), (IN_PARTS, False)])
def test_an_upload_with_a_wrong_byte_is_never_stored(size, signed, s3, proxy):
    if not signed:  # as over TLS: the signature leaves the body out, and our digest is all there is
        storage.s3_client().meta.config.s3 = {"payload_signing_enabled": False}
    uri, old, new = f"{s3}/folder/x", os.urandom(10), os.urandom(size)
    storage.write_bytes(uri, old)
    proxy.plan = lambda request: Fault(corrupt_request=size // 20) if is_put(request) else None
    with pytest.raises(Unavailable, match=rf"{uri} was changed on its way to http"):
        storage.write_bytes(uri, new)
    assert proxy.injected["corrupt_request"] >= objects.ATTEMPTS
    assert storage.read_bytes(uri) == old
    proxy.plan = times(1, Fault(corrupt_request=size // 20), is_put)
    storage.write_bytes(uri, new)
    assert storage.read_bytes(uri) == new
    puts = [request for request in proxy.requests if is_put(request)]
    hidden = [r.headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD" for r in puts]
    assert any(hidden) is not signed
    assert all("x-amz-checksum-sha256" in r.headers for r in puts)


@pytest.mark.parametrize("fault", [Fault(refuse="SlowDown"), Fault(drop=True)], ids=["busy", "off"])
def test_a_store_that_stays_away_is_unavailable_to_all(fault, s3, proxy, once):
    uri = f"{s3}/folder/x"
    proxy.plan = lambda _: fault
    for act in (
        lambda: storage.exists(uri),
        lambda: storage.read_bytes(uri),
        lambda: storage.open_file(uri),
        lambda: storage.write_bytes(uri, b""),
        lambda: storage.list_names(s3),
        lambda: storage.write_folder(f"{s3}/folder", {"x": b""}, last="x"),
        lambda: storage.delete_folder(f"{s3}/folder"),
    ):
        with pytest.raises(Unavailable, match=r"does not answer for|cannot serve .* now \("):
            act()
    assert sum(proxy.injected.values()) == 7


def test_long_work_waits_for_a_store(s3, proxy, monkeypatch, caplog):
    monkeypatch.setattr(objects, "LONGEST_PAUSE", 0.01)
    with storage.longer_retries():
        proxy.plan = times(10, Fault(drop=True))
        storage.write_bytes(f"{s3}/x", b"content")
        proxy.plan = times(10, Fault(refuse="SlowDown"))
        assert storage.read_bytes(f"{s3}/x") == b"content"
    assert "Waiting for the object store, attempt 10: " in caplog.text
