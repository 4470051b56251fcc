"""Random damage to stored files ends in a sentence or changes nothing; `tests/fuzz` has more."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))
import mutate  # pyright: ignore[reportMissingImports]

from ivegan.checkpoint import content


def test_damage_is_refused_or_harmless() -> None:
    counts, failures = mutate.fuzz(cases=380)
    assert not failures, "\n".join(failures)
    assert len(counts) == 19


def test_the_mutations_find_a_digest_that_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(uri: str, name: str, _: object) -> bytes:
        return Path(uri, name).read_bytes()

    monkeypatch.setattr(content, "read_checked", unchecked)
    _, failures = mutate.fuzz(cases=50, only="weights")
    assert any("other data were accepted" in failure for failure in failures)
