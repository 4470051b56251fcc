"""A run says which code computed it, and every rank sees the folder that its driver wrote."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import in_ranks

from ivegan import storage
from pipelines import record as records
from pipelines.training import plan
from pipelines.training.ray_backend import unshared


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Return a function that makes a folder of code without git the code that runs."""
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("IVEGAN_GIT_COMMIT", "IVEGAN_IMAGE_COMMIT"):
        monkeypatch.delenv(name, raising=False)

    def running(folder: str, content: str) -> None:
        path = tmp_path / folder / "pipelines" / "training" / "plan.py"
        storage.write_bytes(path, content.encode())
        monkeypatch.setattr(plan, "__file__", str(path))

    return running


@pytest.mark.parametrize(
    ("folder", "variables", "commit"),
    [
        ("_ray_pkg_0123abcd", {"IVEGAN_IMAGE_COMMIT": "ffff"}, "package-0123abcd"),
        ("_ray_pkg_0123abcd", {"IVEGAN_GIT_COMMIT": "eeee"}, "eeee"),
        ("app", {"IVEGAN_IMAGE_COMMIT": "ffff"}, "ffff"),
    ],
)
def test_the_commit_is_that_of_the_code_which_runs(code, monkeypatch, folder, variables, commit):
    code(folder, "# a plan")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert plan.git_commit() == commit


def test_code_without_git_and_image_is_identified_by_its_content(code):
    commits = []
    for folder, content in (("a", "# a plan"), ("b", "# a plan"), ("c", "# another plan")):
        code(folder, content)
        commits.append(plan.git_commit())
    assert commits[0].startswith("code-")
    assert commits[0] == commits[1] != commits[2]


def _rank(rank: int, world: int, folder: str) -> None:
    assert unshared(folder, "key") == ""
    answer = unshared(f"{folder}-of-another-disk" if rank else folder, "key")
    assert answer.startswith(f"1 of {world} workers do not see ")
    assert socket.gethostname() in answer
    assert "--storage s3://" in answer
    # The record of an earlier run of that name is not the driver's.
    assert unshared(folder, "another key").startswith(f"{world} of {world} workers do not see ")


def test_ranks_that_do_not_see_the_drivers_folder_refuse_together(tmp_path):
    record = records.RunRecord(run_id="a", preset="ring", config={}, key="key")
    records.write_record(str(tmp_path / "a"), record)
    in_ranks(2, _rank, str(tmp_path / "a"))
