"""Stored records: JSON files that are checked against a dataclass when they are read.

Whatever is wrong with a file (cut off, of other types, NaN, a key twice or not known, a name that
leads out of its folder) ends in one sentence that names the file and the entry.
"""

import json
import types
from collections.abc import Iterable
from functools import cache
from pathlib import PurePosixPath
from typing import Any, TypeVar, cast

from ivegan.errors import UserError

T = TypeVar("T")


class DamagedError(UserError):
    """A stored file is not what was written."""

    def __init__(self, sentence: str, data: bytes = b"") -> None:
        super().__init__(sentence)
        self.data = data
        """What was read, where something of it may be saved."""


def parse_json(content: bytes, name: str, remedy: str = "restore or delete it") -> Any:
    """Return the value of a JSON file; raise DamagedError as for ``read``."""
    try:
        return json.loads(content, parse_constant=_refuse, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is damaged ({error}): {remedy}.") from error


def read(
    content: bytes,
    kind: type[T] | types.GenericAlias,
    name: str,
    remedy: str = "restore or delete it",
) -> T:
    """Return the dataclass, or another type, that a JSON file holds.

    Raises:
        DamagedError: it does not; the sentence has the file's name, the entry and the remedy.
    """
    return check(parse_json(content, name, remedy), kind, name, remedy)


def check(
    value: Any, kind: type[T] | types.GenericAlias, name: str, remedy: str = "restore or delete it"
) -> T:
    """Return plain values as a dataclass, or another type; as for ``read``."""
    try:
        return convert(value, kind)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is damaged ({error}): {remedy}.") from error


def convert(value: Any, kind: type[T] | types.GenericAlias) -> T:
    """Return plain values as a dataclass, or another type.

    Raises:
        ValueError: they are none; its text is the entry and what it should be.
    """
    from pydantic import ValidationError

    text = json.dumps(value, allow_nan=False)
    try:
        return cast(T, _adapter(kind).validate_json(text, strict=True, extra="forbid"))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "it"
        raise ValueError(f"{where}: {problem['msg']}") from error


def inside(name: str) -> str:
    """Return the name of a file in a folder.

    Raises:
        ValueError: the name leads out of the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} leads out of its folder")
    return name


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"{key!r} stands there twice")
        out[key] = value
    return out


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
