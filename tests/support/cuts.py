"""Registrations cut between two calls of MLflow's client."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.models import package


class CutError(Exception):
    """The process that writes to MLflow dies before its next call."""


def cut_after(calls: int, patch: pytest.MonkeyPatch) -> None:
    """Let only so many calls that write to MLflow's registry come through."""
    left = iter(range(calls))

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_die(*args: Any, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise CutError
            return call(*args, **kwargs)

        return call_or_die

    for name in dir(MlflowClient):
        if name.startswith(("set_", "delete_", "transition_", "create_", "log_", "finalize_")):
            patch.setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))


def copied(write: Callable[..., str], kept: Path) -> Callable[..., str]:
    """Return a function that writes a half's files once, and copies them from then on."""
    digests: dict[str, str] = {}

    def write_or_copy(folder: Path, half: package.Half, *given: Any) -> str:
        if half.kind not in digests:
            digests[half.kind] = write(kept / half.kind, half, *given)
        shutil.copytree(kept / half.kind, folder)
        return digests[half.kind]

    return write_or_copy
