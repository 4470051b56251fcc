"""Files here and in an object store, under one set of names; the only place that knows ``s3://``.

A URI is a local path, ``file://…`` or ``s3://bucket/key``. Endpoint, region and path style are
resolved once, in ``s3_settings``, for boto3, pyarrow, MLflow and Metaflow alike; credentials are
left to each library's standard chain. Whatever is written appears whole or not at all.
"""

import contextlib
import functools
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from ivegan.errors import UserError

if TYPE_CHECKING:
    import pyarrow.fs

_ATTEMPTS = 5  # of each request, with botocore's exponential back-off between them
_READ_AHEAD = 1 << 20


def s3_settings() -> dict[str, Any]:
    """Return ``endpoint`` (or None for AWS itself), ``region`` and ``path_style``."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
    endpoint = next((os.environ[name] for name in names if os.environ.get(name)), None)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"endpoint": endpoint, "region": region, "path_style": endpoint is not None}


def environment() -> dict[str, str]:
    """Return the variables that lead MLflow, Metaflow and Ray workers to the same store."""
    settings = s3_settings()
    out = {"AWS_REGION": settings["region"], "AWS_DEFAULT_REGION": settings["region"]}
    if settings["endpoint"]:
        names = ("AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL", "METAFLOW_S3_ENDPOINT_URL")
        out |= dict.fromkeys(names, settings["endpoint"])
        out["MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"] = "path"
    return out


def s3_client() -> Any:
    """Return this process's boto3 client for the resolved endpoint.

    Raises:
        UserError: the endpoint is not a URL.
    """
    settings = s3_settings()
    return _client(settings["endpoint"], settings["region"], os.getpid())


def filesystem(uri: str | Path) -> "tuple[pyarrow.fs.FileSystem, str]":
    """Return pyarrow's file system for a URI, and the path in it: what Ray's storage wants."""
    from pyarrow import fs

    place = _parse(uri)
    if isinstance(place, Path):
        return fs.LocalFileSystem(), str(place)
    # The constructor, unlike from_uri, does not read AWS_ENDPOINT_URL: everything is said here.
    settings = s3_settings()
    options: dict[str, Any] = {"region": settings["region"]}
    if settings["endpoint"]:
        parts = urlsplit(settings["endpoint"])
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
    return fs.S3FileSystem(retry_strategy=retry, **options), "/".join(place).rstrip("/")


def absolute(uri: str | Path) -> str:
    """Return the URI with a local path made absolute, and without a trailing slash."""
    place = _parse(uri)
    return str(place) if isinstance(place, Path) else f"s3://{'/'.join(place)}".rstrip("/")


def join(uri: str | Path, *parts: str) -> str:
    """Return the URI of something below."""
    return "/".join([str(uri).rstrip("/"), *(part.strip("/") for part in parts)])


def is_local(uri: str | Path) -> bool:
    """Return whether the URI names a path of this machine."""
    return isinstance(_parse(uri), Path)


def exists(uri: str | Path) -> bool:
    """Return whether there is a file, or a folder with something in it."""
    place = _parse(uri)
    if isinstance(place, Path):
        return place.exists()
    bucket, key = place
    with _told(uri):
        if key and _head(bucket, key) is not None:
            return True
        prefix = f"{key}/" if key else ""
        found = s3_client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return found.get("KeyCount", 0) > 0


def read_bytes(uri: str | Path) -> bytes:
    """Return a file's content.

    Raises:
        UserError: no such file, or no way to it.
    """
    place = _parse(uri)
    with _told(uri):
        if isinstance(place, Path):
            return place.read_bytes()
        # download_fileobj, unlike get_object, takes up again where a connection broke
        into = io.BytesIO()
        s3_client().download_fileobj(*place, into)
        return into.getvalue()


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Write a file, which holds the old content or the new one at every moment."""
    place = _parse(uri)
    with _told(uri):
        if isinstance(place, tuple):
            s3_client().upload_fileobj(io.BytesIO(data), *place)
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=place.parent, prefix=f".{place.name}.", delete=False
        ) as file:
            try:
                file.write(data)
                file.close()
                Path(file.name).chmod(0o644)
                Path(file.name).replace(place)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


@contextlib.contextmanager
def open_file(uri: str | Path) -> Iterator[io.BufferedReader]:
    """Yield a seekable file for reading in place: an archive need not be copied first.

    Raises:
        UserError: no such file, or no way to it.
    """
    place = _parse(uri)
    if isinstance(place, Path):
        with _told(uri), place.open("rb") as file:
            yield file
        return
    if not exists(uri):
        raise UserError(f"There is no file {uri}: correct the URI.")
    system, path = filesystem(uri)
    with _told(uri), system.open_input_file(path) as remote:
        yield io.BufferedReader(cast(Any, remote), _READ_AHEAD)


def list_names(uri: str | Path) -> list[str]:
    """Return the names directly below a folder, sorted; none where it does not exist."""
    place = _parse(uri)
    if isinstance(place, Path):
        return sorted(child.name for child in place.iterdir()) if place.is_dir() else []
    return sorted({name.partition("/")[0] for name in list_files(uri)})


def list_files(uri: str | Path) -> dict[str, int]:
    """Return all files below a folder, at any depth: relative name with slashes -> bytes."""
    place = _parse(uri)
    if isinstance(place, Path):
        files = sorted(path for path in place.rglob("*") if path.is_file())
        return {path.relative_to(place).as_posix(): path.stat().st_size for path in files}
    bucket, key = place
    prefix = f"{key}/" if key else ""
    with _told(uri):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [item for page in pages for item in page.get("Contents", [])]
    return {item["Key"].removeprefix(prefix): item["Size"] for item in found}


def upload_folder(local: str | Path, uri: str | Path, last: str | None = None) -> None:
    """Put a copy of a local folder at the URI, in place of what is there.

    Args:
        local: the folder.
        uri: where its files go; locally the copy appears by one renaming.
        last: the file that goes up last in an object store, so that it marks the folder as whole.
    """
    place, source = _parse(uri), Path(local)
    with _told(uri):
        if isinstance(place, Path):
            _replace_folder(source, place)
            return
        delete_folder(uri, first=last)
        bucket, key = place
        names = [path.relative_to(source).as_posix() for path in _files(source)]
        for name in sorted(names, key=lambda name: (name == last, name)):
            s3_client().upload_file(str(source / name), bucket, f"{key}/{name}")


def download_folder(uri: str | Path, local: str | Path) -> None:
    """Copy all files below the URI into a local folder.

    Raises:
        UserError: nothing there.
    """
    place, target = _parse(uri), Path(local)
    names = list_files(uri)
    if not names:
        raise UserError(f"There is no folder {uri}, or nothing in it: correct the URI.")
    with _told(uri):
        for name in names:
            # A key is a name that somebody else chose: it must not lead out of the target.
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{uri} holds {name!r}, which is no name for a file: remove it.")
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(place, Path):
                shutil.copyfile(place / name, path)
            else:
                s3_client().download_file(place[0], f"{place[1]}/{name}", str(path))


def delete_folder(uri: str | Path, first: str | None = None) -> None:
    """Delete all files below the URI; none there is no mistake.

    Args:
        uri: the folder.
        first: the marker file, deleted before all others so that no half looks whole.
    """
    place = _parse(uri)
    if isinstance(place, Path):
        if place.is_dir():
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as away:
                place.rename(Path(away) / place.name)
        return
    bucket, key = place
    assert key, "a whole bucket is never deleted"
    with _told(uri):
        names = sorted(list_files(uri), key=lambda name: (name != first, name))
        batches = [names[:1], *(names[i : i + 1000] for i in range(1, len(names), 1000))]
        for batch in filter(None, batches):
            keys = [{"Key": f"{key}/{name}"} for name in batch]
            s3_client().delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})


def _parse(uri: str | Path) -> Path | tuple[str, str]:
    """Return an absolute local path, or (bucket, key)."""
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


@functools.lru_cache(maxsize=4)
def _client(endpoint: str | None, region: str, process: int) -> Any:
    """Return a boto3 client; one per process, for connections do not survive a fork."""
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        connect_timeout=10,
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    try:
        # a session of its own: boto3's default one would keep credentials that have changed since
        return Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except ValueError as error:
        raise UserError(
            f"AWS_ENDPOINT_URL is {endpoint!r}, which is no URL: write http://HOST:PORT."
        ) from error


def _head(bucket: str, key: str) -> Mapping[str, Any] | None:
    from botocore.exceptions import ClientError

    try:
        return s3_client().head_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] in ("404", "NoSuchKey", "NotFound"):
            return None
        raise


def _bucket_exists(bucket: str) -> bool:
    from botocore.exceptions import ClientError

    try:
        s3_client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response["Error"]["Code"] not in ("404", "NoSuchBucket")
    return True


@contextlib.contextmanager
def _told(uri: str | Path) -> Iterator[None]:
    """Turn what a user can mend about a place into a UserError."""
    if isinstance(_parse(uri), Path):
        with _told_local(uri):
            yield
        return
    from boto3.exceptions import S3UploadFailedError
    from botocore import exceptions as aws

    at = s3_settings()["endpoint"] or "AWS"
    bucket = str(uri).removeprefix("s3://").partition("/")[0]
    try:
        yield
    except (aws.NoCredentialsError, aws.PartialCredentialsError) as error:
        raise UserError(
            f"There are no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error
    except (aws.ConnectionError, aws.HTTPClientError) as error:
        raise UserError(
            f"The object store at {at} does not answer for {uri}: check AWS_ENDPOINT_URL."
        ) from error
    except aws.ParamValidationError as error:
        what = str(error).replace("\n", " ").partition(": Bucket name must")[0]
        raise UserError(f"{uri} is no valid place in an object store: {what}.") from error
    except (aws.ClientError, S3UploadFailedError) as error:
        # boto3's uploads wrap the refusal in an error that carries its code in the text alone
        code = error.response["Error"]["Code"] if isinstance(error, aws.ClientError) else str(error)
        missing = code in ("404", "NotFound") or "NoSuchKey" in code
        if "NoSuchBucket" in code or (missing and not _bucket_exists(bucket)):
            raise UserError(
                f"There is no bucket {bucket!r} at {at}: create it or correct {uri}."
            ) from error
        if missing:
            raise UserError(f"There is no file {uri}: correct the URI.") from error
        denied = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
        if code in denied or any(word in code for word in denied[1:]):
            raise UserError(
                f"Access to {uri} at {at} was denied: check AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY and what they may do."
            ) from error
        raise


@contextlib.contextmanager
def _told_local(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}: correct the path.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder where a file is expected.") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{path} cannot be a folder: a file stands in its way.") from error
    except PermissionError as error:
        raise UserError(f"{path} may not be read or written: change its permissions.") from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _replace_folder(source: Path, target: Path) -> None:
    """Copy beside the target and rename, so that a reader sees a whole folder or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        fresh = Path(beside) / "new"
        shutil.copytree(source, fresh, copy_function=shutil.copyfile)
        if target.exists():
            target.rename(Path(beside) / "old")
        fresh.rename(target)
