"""Places: local paths, ``file://…`` and ``s3://bucket/key``, and the settings of object storage."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ivegan.errors import UserError

Object = tuple[str, str]
"""Bucket and key."""


def parse(uri: str | Path) -> Path | Object:
    """Return an absolute local path, or bucket and key."""
    if isinstance(uri, Path) or "://" not in uri:
        if not str(uri):
            raise UserError("An empty path was given: name a folder or an s3:// URI.")
        return Path(uri).expanduser().absolute()
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return Path(unquote("/" + rest.lstrip("/")))
    if scheme != "s3":
        raise UserError(f"{uri} has an unknown scheme: give a local path, file:// or s3://.")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise UserError(f"{uri} names no bucket: write s3://BUCKET/KEY.")
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


def s3_settings() -> dict[str, Any]:
    """Return ``endpoint`` (or None for AWS itself), ``region`` and ``path_style``."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), None)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"endpoint": endpoint, "region": region, "path_style": endpoint is not None}


def environment() -> dict[str, str]:
    """Return the variables that give MLflow, Metaflow and Ray workers the same settings."""
    settings = s3_settings()
    variables = {"AWS_REGION": settings["region"], "AWS_DEFAULT_REGION": settings["region"]}
    if settings["endpoint"]:
        names = ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL", "METAFLOW_S3_ENDPOINT_URL")
        variables |= dict.fromkeys(names, settings["endpoint"])
        variables["MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"] = "path"
    return variables
