"""A run's folder belongs to one process at a time."""

import dataclasses
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ivegan import storage
from ivegan.config import preset
from ivegan.errors import UserError
from pipelines import claim
from pipelines import record as records
from pipelines.claim import _Claim, claimed
from pipelines.training.fit import fit
from pipelines.training.plan import Run, resolve


def write(folder: Path, number: int, **changes: object) -> None:
    content = dataclasses.replace(_Claim(), **changes).encode()  # pyright: ignore[reportArgumentType]
    storage.write_bytes(folder / f"claim-{number:010d}.json", content)


def numbers(folder: Path) -> list[int]:
    return [int(path.stem[-10:]) for path in sorted(folder.glob("claim-*"))]


def test_of_many_at_once_one_owns_the_folder(tmp_path: Path) -> None:
    all_tried = threading.Barrier(8)

    def attempt(_: int) -> bool:
        try:
            with claimed(str(tmp_path), 0, print):
                all_tried.wait()
                return True
        except UserError:
            all_tried.wait()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1
    assert numbers(tmp_path) == [1]
    with claimed(str(tmp_path), 0, print):  # released at the end
        assert numbers(tmp_path) == [1, 2]


def test_the_claim_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    write(tmp_path, 1, pid_started=1.0)
    with claimed(str(tmp_path), 0, print) as lost:
        assert not lost.is_set()


@pytest.mark.parametrize("damaged", [False, True])
def test_an_owner_elsewhere_that_does_not_renew_loses_the_folder(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_LEASE", 0.2)
    monkeypatch.setattr(claim, "_LOOK", 0.05)
    write(tmp_path, 1, host="elsewhere")
    if damaged:
        (tmp_path / "claim-0000000001.json").write_bytes(b"{")
    lines: list[str] = []
    with pytest.raises(UserError, match="in use"), claimed(str(tmp_path), 0, print):
        pass
    with claimed(str(tmp_path), 60, lines.append):
        assert numbers(tmp_path) == [1, 2]
    assert "waiting for process" in lines[0]


def test_an_owner_that_lost_the_folder_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "_RENEWAL", 0.05)
    stopped = threading.Event()
    signals: list[int] = []
    monkeypatch.setattr("os.kill", lambda _, number: (signals.append(number), stopped.set()))
    with claimed(str(tmp_path), 0, print) as lost:
        first = (tmp_path / "claim-0000000001.json").read_bytes()
        write(tmp_path, 2, host="elsewhere")
        assert stopped.wait(60)
        assert lost.is_set()
    assert signals == [signal.SIGTERM]
    assert not json.loads(first)["released"]
    assert not json.loads((tmp_path / "claim-0000000001.json").read_bytes())["released"]


def test_a_run_whose_folder_is_in_use_does_not_start(home: Path, store: str) -> None:
    plan = resolve("ring", preset("ring"), Run(workers=0, run_id="a"))
    with claimed(plan.run_uri, 0, print), pytest.raises(UserError, match="is in use by process"):
        fit(plan)
    assert not records.exists(plan.run_uri)
