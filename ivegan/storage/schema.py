"""Stored records: JSON files that are checked against a dataclass when they are read.

Whatever is wrong with a file (cut off, of other types, NaN, a key twice or not known, a name that
leads out of its folder) ends in one sentence that names the file and the entry.
"""

import dataclasses
import json
import math
import types
from collections.abc import Iterable
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ivegan.errors import UserError

T = TypeVar("T")


class DamagedError(UserError):
    """A stored file is not what was written."""


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
        return cast(T, _convert(value, kind, ""))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} is damaged ({error}): {remedy}.") from error


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
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _convert(value: Any, kind: Any, path: str) -> Any:
    """Return a plain value as a type says, or raise ValueError with the entry's name."""
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, cast(type, kind), path)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal and value in inner and type(value) in map(type, inner):
        return value
    if origin in (Union, types.UnionType):
        for option in inner:
            try:
                return _convert(value, option, path)
            except ValueError:
                continue
    elif origin is dict and isinstance(value, dict):
        return {k: _convert(v, inner[1], f"{path}.{k}") for k, v in value.items()}
    elif origin is list and isinstance(value, list):
        return [_convert(v, inner[0], f"{path}[{i}]") for i, v in enumerate(value)]
    elif origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            pairs = enumerate(zip(value, kinds, strict=True))
            return tuple(_convert(v, k, f"{path}[{i}]") for i, (v, k) in pairs)
    elif kind is float and type(value) in (int, float):
        if math.isfinite(value):
            return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{path.lstrip('.') or 'it'} is {_short(value)}, not {_named(kind)}")


def _dataclass(value: Any, kind: type, path: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{path.lstrip('.') or 'it'} is {_short(value)}, not an object")
    hints, fields = _hints(kind), dataclasses.fields(kind)
    required = {
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    for problem, names in (
        ("is missing", required - value.keys()),
        ("is not known to this version", value.keys() - {f.name for f in fields}),
    ):
        if names:
            raise ValueError(f"{path.lstrip('.') + '.' if path else ''}{min(names)} {problem}")
    return kind(**{k: _convert(v, hints[k], f"{path}.{k}") for k, v in value.items()})


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, dict | list) else type(value).__name__
    return text if len(text) < 40 else text[:37] + "…"


def _named(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
