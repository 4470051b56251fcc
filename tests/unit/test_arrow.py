"""The file system that Ray writes to the object store with."""

import pytest

from ivegan.storage import objects
from ivegan.storage.arrow import ObjectFiles


def test_a_finalizer_sends_nothing(monkeypatch):
    """An upload in a finalizer waited for a lock that the call it interrupted held."""
    sent: list[bytes] = []

    def upload(place: objects.Object, data: bytes) -> None:
        sent.append(data)
        raise ConnectionError("away")

    monkeypatch.setattr(objects, "upload", upload)
    abandoned = ObjectFiles().open_output_stream("bucket/key", None)
    abandoned.write(b"half")
    del abandoned
    assert sent == []
    refused = ObjectFiles().open_output_stream("bucket/key", None)
    refused.write(b"whole")
    with pytest.raises(ConnectionError):
        refused.close()
    del refused
    assert sent == [b"whole"]
