"""No password is printed."""

import pytest

from ivegan.errors import UserError, public


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://host:5432/db"),
        ("postgresql://me:sec/ret@host/db", "postgresql://host/db"),
        ("http://me:s@cret@host/x@y", "http://host/x@y"),
        ("http://token@host/x", "http://host/x"),
        ("http://host:5000/api", "http://host:5000/api"),
        ("s3://bucket/key@2", "s3://bucket/key@2"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("mysql://host/db?user=me&password=secret&x=1", "mysql://host/db?user=…&password=…&x=1"),
        ("https://h/f.gz?X-Amz-Credential=A&X-Amz-Signature=secret", None),
        ("at http://u:secret@a/ and http://u:secret@b/", "at http://a/ and http://b/"),
    ],
)
def test_credentials_are_left_out(text: str, shown: str | None) -> None:
    assert "secret" not in public(text)
    assert "cret" not in str(UserError(text))
    if shown is not None:
        assert public(text) == shown
    assert public(public(text)) == public(text)
