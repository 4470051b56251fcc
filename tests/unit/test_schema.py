"""Damage of any kind to a stored record ends in one sentence that names the file."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from ivegan.errors import UserError
from ivegan.storage import schema


@dataclass(frozen=True)
class Part:
    name: str
    size: int


@dataclass(frozen=True)
class Example:
    kind: Literal["a", "b"]
    ratio: float
    parts: tuple[Part, ...] = ()
    shape: tuple[int, int] = (1, 1)
    counts: dict[str, int] = field(default_factory=dict)
    parent: str | None = None


GOOD = Example("a", 0.5, (Part("x", 1), Part("y", 2)), (3, 4), {"n": 1}, "p")


def read(text: str) -> Example:
    return schema.read(text.encode(), Example, "place/example.json", "write it again")


def test_what_was_written_is_read() -> None:
    assert read(json.dumps(dataclasses.asdict(GOOD))) == GOOD
    assert read('{"kind": "b", "ratio": 1}') == Example("b", 1.0)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "Expecting value"),
        ("[" * 3000, "recursion|Expecting value"),  # Python 3.13 reads so deep
        ("[]", "it: Input should be an object"),
        ('{"kind": "a"}', "ratio: Field required"),
        ('{"kind": "c", "ratio": 1}', "kind: Input should be 'a' or 'b'"),
        ('{"kind": "a", "ratio": NaN}', "NaN"),
        ('{"kind": "a", "ratio": 1e999}', "Out of range float"),
        ('{"kind": "a", "ratio": true}', "ratio: Input should be a valid number"),
        ('{"kind": "a", "ratio": 1, "ratio": 2}', "twice"),
        ('{"kind": "a", "ratio": 1, "more": 2}', "more: Unexpected keyword argument"),
        ('{"kind": "a", "ratio": 1, "shape": [1]}', r"shape\.1: Field required"),
        (
            '{"kind": "a", "ratio": 1, "shape": [1, 2.5]}',
            r"shape\.1: Input should",
        ),
        ('{"kind": "a", "ratio": 1, "parts": [{"name": "x"}]}', r"parts\.0\.size: Field required"),
        (
            '{"kind": "a", "ratio": 1, "counts": {"n": "1"}}',
            r"counts\.n: Input should",
        ),
        ('{"kind": "a", "ratio": 1, "parent": 5}', "parent: Input should be a valid string"),
    ],
)
def test_damage_is_a_sentence(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith("place/example.json is damaged (")
    assert message.endswith("): write it again.")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../../x", "a\\b", "a\0b"])
def test_names_stay_inside_their_folder(name: str) -> None:
    assert schema.inside("train/shard-00000.tar") == "train/shard-00000.tar"
    with pytest.raises(ValueError, match="leads out"):
        schema.inside(name)
