"""Commands say where their results are."""

from pathlib import Path

import pytest

from ivegan.errors import UserError
from pipelines.paths import mlflow_place, sqlite_path


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("https://me:secret@mlflow.example", "https://mlflow.example"),
        (
            "sqlite:////tmp/a b.db",
            "mlflow ui --backend-store-uri 'sqlite:////tmp/a b.db', then http://127.0.0.1:5000/",
        ),
        ("", "make ui, then http://127.0.0.1:5000/"),
    ],
)
def test_the_last_line_names_the_server_without_a_password_or_what_starts_one(
    monkeypatch, uri, place
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert mlflow_place().partition("#")[0] == place


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "sqlite+pysqlite:///?cache=x"])
def test_a_store_in_memory_is_refused(uri):
    with pytest.raises(UserError, match="in memory"):
        sqlite_path(uri)


def test_addresses_of_sqlite_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sqlite_path("sqlite:////a/b%20c.db?timeout=5") == Path("/a/b c.db")
    assert sqlite_path("sqlite+pysqlite:///runs/mlflow.db") == tmp_path / "runs" / "mlflow.db"
    for uri in ("postgresql://host/db", "http://host:5000", "databricks"):
        assert sqlite_path(uri) is None
