"""Places: local paths, ``file://…`` and ``s3://bucket/key``."""

import re
from pathlib import Path
from urllib.parse import unquote

from ivegan.errors import UserError

Object = tuple[str, str]
"""Bucket and key."""


def parse(uri: str | Path) -> Path | Object:
    """Return an absolute local path, or bucket and key."""
    if isinstance(uri, Path) or "://" not in uri:
        if not str(uri):
            raise UserError("An empty path was given: name a folder or an s3:// URI.")
        try:
            return Path(uri).expanduser().absolute()
        except RuntimeError as error:
            raise UserError(f"{uri} names no user of this machine: correct the path.") from error
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return Path(unquote("/" + rest.lstrip("/")))
    if scheme != "s3":
        raise UserError(f"{uri} has an unknown scheme: give a local path, file:// or s3://.")
    bucket, _, key = rest.partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}", bucket):
        raise UserError(
            f"{uri} names no bucket that can be: write s3://BUCKET/KEY, where BUCKET has 3 or more "
            "letters, digits, '-', '.' and '_'."
        )
    return bucket, key.strip("/")


def absolute(uri: str | Path) -> str:
    """Return the URI with a local path made absolute, and without a trailing slash."""
    place = parse(uri)
    return str(place) if isinstance(place, Path) else f"s3://{'/'.join(place)}".rstrip("/")


def join(uri: str | Path, *names: str) -> str:
    """Return the URI of a file or folder below."""
    return "/".join([str(uri).rstrip("/"), *(name.strip("/") for name in names)])


def is_local(uri: str | Path) -> bool:
    """Return whether the URI names a path of this machine."""
    return isinstance(parse(uri), Path)
