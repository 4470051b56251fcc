"""Registrations cut between two calls of MLflow's client."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.models import package


class CutError(Exception):
    """The process that writes to MLflow dies before its next call."""


class Fragile:
    """Cuts the calls that write to MLflow's registry, after so many of them."""

    WRITING = re.compile("^(set_|delete_|transition_|create_|log_|finalize_)")

    def __init__(self, patch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        self.was_cut = False
        for name in filter(self.WRITING.match, dir(MlflowClient)):
            patch.setattr(MlflowClient, name, self._counted(getattr(MlflowClient, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                self.was_cut = True
                raise CutError
            self.left -= 1
            return call(*args, **kwargs)

        return counted


def copied(write: Callable[..., str], kept: Path) -> Callable[..., str]:
    """Return a function that writes a half's files once, and copies them from then on."""
    digests: dict[str, str] = {}

    def write_or_copy(folder: Path, half: package.Half, *given: Any) -> str:
        if half.kind not in digests:
            digests[half.kind] = write(kept / half.kind, half, *given)
        shutil.copytree(kept / half.kind, folder)
        return digests[half.kind]

    return write_or_copy
