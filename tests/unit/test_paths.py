"""Commands say where their results are."""

import pytest

from pipelines.paths import mlflow_place


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("https://me:secret@mlflow.example", "https://mlflow.example"),
        ("sqlite:////tmp/mlflow.db", "make ui, then http://127.0.0.1:5000/"),
        ("", "make ui, then http://127.0.0.1:5000/"),
    ],
)
def test_the_last_line_names_the_server_without_a_password_or_what_starts_one(
    monkeypatch, uri, place
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert mlflow_place().partition("#")[0] == place
