"""Files here and in an object store, under one set of names; the only place that knows ``s3://``.

A URI is a local path, ``file://…`` or ``s3://bucket/key``. Endpoint, region and path style are
resolved once, in ``s3_settings``, for boto3, pyarrow, MLflow and Metaflow alike; credentials are
left to each library's standard chain. Whatever is written appears whole or not at all.

What is sent to a store carries a SHA-256 for the store to check, and the same among the object's
metadata, where a reader of the whole object finds it and checks again: not every store does.
"""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, ParamSpec, TypeVar, cast
from urllib.parse import unquote, urlsplit

from ivegan.errors import UserError

if TYPE_CHECKING:
    import pyarrow.fs

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
_File = io.BytesIO | IO[bytes]

_ATTEMPTS = 5  # of each request, with botocore's exponential back-off between them
_CONNECT_WITHIN, _ANSWER_WITHIN = 10, 30  # seconds
_PATIENCE = 120.0  # seconds of long work waiting for a store
_LONGEST_PAUSE = 5.0  # seconds between two attempts
_READ_AHEAD = 1 << 20
_CHUNK = 1 << 16  # what a connection that is reset can lose
_DIGEST = "sha256"  # among an object's metadata
_jitter = random.SystemRandom()  # not the generator that a training seeds
_BUSY = (
    "ConditionalRequestConflict",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
)
_GARBLED = ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")

_NO_SPACE = "No space is left for {path}: free some, or choose another place."
_LOCAL = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: "{path} grows larger than files may be here: choose another place.",
    errno.EROFS: "{path} lies on a disk that is read-only: choose another place.",
    errno.ENAMETOOLONG: "The name {path} is too long: choose a shorter one.",
}


class Unavailable(UserError):  # noqa: N818
    """The object store does not answer, or says that it cannot now: it may, later."""


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
    # The constructor, unlike from_uri, does not read AWS_ENDPOINT_URL: all settings are given here.
    settings = s3_settings()
    options: dict[str, Any] = {"region": settings["region"]}
    if settings["endpoint"]:
        parts = urlsplit(settings["endpoint"])
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    options |= {"connect_timeout": _CONNECT_WITHIN, "request_timeout": _ANSWER_WITHIN}
    retry = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
    return fs.S3FileSystem(retry_strategy=retry, **options), "/".join(place).rstrip("/")


def patiently(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a call returns, made again while the store is unavailable.

    For long work that a restart of the store should not end. A command's first look should fail
    at once instead: the address may be wrong.

    Raises:
        Unavailable: for ``_PATIENCE`` seconds since the first failure.
    """
    first, failures = 0.0, 0
    while True:
        try:
            return call(*args, **kwargs)
        except Unavailable as error:
            failures += 1
            now = time.monotonic()
            first = first if failures > 1 else now
            if now - first >= _PATIENCE:
                raise
            log.warning("%s Trying again: failure %d.", error, failures)
            _pause(failures)


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
    with _reported(uri):
        if isinstance(place, Path):
            return place.exists()
        bucket, key = place
        if key and _head(bucket, key) is not None:
            return True
        prefix = f"{key}/" if key else ""
        found = s3_client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return found.get("KeyCount", 0) > 0


def read_bytes(uri: str | Path) -> bytes:
    """Return a file's content, all of one state; an object's digest is checked where it has one.

    Raises:
        UserError: no such file, no way to it, or a wrong digest.
    """
    place = _parse(uri)
    with _reported(uri):
        if isinstance(place, Path):
            return place.read_bytes()
        into = io.BytesIO()
        _fetch(place, into)
        return into.getvalue()


def read_range(uri: str | Path, start: int, length: int) -> bytes:
    """Return so many bytes of a file, from a place in it on.

    Raises:
        UserError: the file is shorter, or as for ``read_bytes``.
    """
    place = _parse(uri)
    into = io.BytesIO()
    with _reported(uri):
        if isinstance(place, Path):
            with place.open("rb") as file:
                file.seek(start)
                into.write(file.read(length))
        elif length:
            _fetch(place, into, range(start, start + length))
    if into.tell() < length:
        raise _too_short(uri, start + length)
    return into.getvalue()


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Write a file, which holds the old content or the new one at every moment."""
    with new_file(uri) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(uri: str | Path) -> Iterator[IO[bytes]]:
    """Yield a file to write to, which takes the old one's place when the block ends well."""
    place = _parse(uri)
    with _reported(uri):
        if isinstance(place, tuple):
            body = io.BytesIO()
            yield body
            _send(place, body)
            return
        with _beside(place) as file:
            yield file
            _finish(file).replace(place)


def create_bytes(uri: str | Path, data: bytes) -> bytes:
    """Write a file unless there is one, and return what stands there then: ours or the other's.

    Locally, and in a store whose conditional writes are atomic, all who call this at once get the
    same answer. Some stores look and write in two steps: there two callers may each see their own
    content for a moment, so look again before anything rests on it.
    """
    place = _parse(uri)
    with _reported(uri):
        if isinstance(place, tuple):
            return _create_object(place, data)
        with _beside(place) as file:
            file.write(data)
            fresh = _finish(file)
            try:
                place.hardlink_to(fresh)
            except FileExistsError:
                pass  # the other's, read below
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                if not place.exists():  # no hard links here, as on FAT: two steps
                    fresh.replace(place)
        return place.read_bytes()


@contextlib.contextmanager
def open_file(uri: str | Path) -> Iterator[io.BufferedReader]:
    """Yield a seekable file for reading in place: an archive need not be copied first.

    Raises:
        UserError: no such file, no way to it, or it changed while it was read.
    """
    place = _parse(uri)
    if isinstance(place, Path):
        with _reported(uri), place.open("rb") as file:
            yield file
        return
    with _reported(uri):
        found = _head(*place)
    if found is None:
        raise UserError(f"There is no file {uri}: correct the URI.")
    with io.BufferedReader(cast(Any, _Remote(uri, place, found)), _READ_AHEAD) as file:
        yield file


def list_names(uri: str | Path) -> list[str]:
    """Return the names directly below a folder, sorted; none where it does not exist."""
    place = _parse(uri)
    if isinstance(place, Path):
        with _reported(uri):
            return sorted(child.name for child in place.iterdir()) if place.is_dir() else []
    return sorted({name.partition("/")[0] for name in list_files(uri)})


def list_files(uri: str | Path) -> dict[str, int]:
    """Return all files below a folder, at any depth: relative name with slashes -> bytes."""
    place = _parse(uri)
    if isinstance(place, Path):
        sizes = {}
        with _reported(uri):
            for path in _files(place):
                with contextlib.suppress(
                    FileNotFoundError
                ):  # another process's temporary file, gone
                    sizes[path.relative_to(place).as_posix()] = path.stat().st_size
        return sizes
    bucket, key = place
    prefix = f"{key}/" if key else ""
    with _reported(uri):
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
    with _reported(uri):
        if isinstance(place, Path):
            _replace_folder(source, place)
            return
        delete_folder(uri, first=last)
        bucket, key = place
        names = [path.relative_to(source).as_posix() for path in _files(source)]
        for name in sorted(names, key=lambda name: (name == last, name)):
            path = source / name
            with _reported(join(uri, name)), _reported_local(path), path.open("rb") as file:
                _send((bucket, f"{key}/{name}"), file)


def download_folder(uri: str | Path, local: str | Path) -> None:
    """Copy all files below the URI into a local folder.

    Raises:
        UserError: nothing there.
    """
    place, target = _parse(uri), Path(local)
    names = list_files(uri)
    if not names:
        raise UserError(f"There is no folder {uri}, or nothing in it: correct the URI.")
    with _reported(uri):
        for name in names:
            # A key is a name that another program chose: it must not lead out of the target.
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{uri} holds {name!r}, which is no name for a file: remove it.")
            path = target / name
            with _reported(join(uri, name)), _reported_local(path), _beside(path) as file:
                if isinstance(place, Path):
                    shutil.copyfile(place / name, file.name)
                else:
                    _fetch((place[0], f"{place[1]}/{name}"), file)
                _finish(file).replace(path)


def delete_folder(uri: str | Path, first: str | None = None) -> None:
    """Delete all files below the URI; none there is no mistake.

    Args:
        uri: the folder.
        first: the marker file, deleted before all others so that no half looks whole.
    """
    place = _parse(uri)
    if isinstance(place, Path):
        with _reported(uri):
            if place.is_dir():
                near = tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.")
                with near as away:
                    place.rename(Path(away) / place.name)
        return
    bucket, key = place
    assert key, "a whole bucket is never deleted"
    with _reported(uri):
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
        connect_timeout=_CONNECT_WITHIN,
        read_timeout=_ANSWER_WITHIN,
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
    """Return False if the store says that there is no such bucket."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        s3_client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response["Error"]["Code"] not in ("404", "NoSuchBucket")
    except BotoCoreError as error:
        log.debug("no answer about the bucket %s: %s", bucket, error)
    return True


def _send(place: tuple[str, str], body: _File) -> None:
    """Upload an open file, in parts if it is large."""
    extra = _checks(body)
    body.seek(0)
    s3_client().upload_fileobj(body, *place, ExtraArgs=extra)


def _checks(body: _File) -> dict[str, Any]:
    """Return the checksums with which the store checks an upload and a reader its copy."""
    return {"ChecksumAlgorithm": "SHA256", "Metadata": {_DIGEST: _sha256(body)}}


def _create_object(place: tuple[str, str], data: bytes) -> bytes:
    from botocore.exceptions import ClientError

    (bucket, key), body = place, io.BytesIO(data)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            condition = {"IfNoneMatch": "*", **_checks(body)}
            s3_client().put_object(Bucket=bucket, Key=key, Body=data, **condition)
        except ClientError as error:
            status = _status(error)
            if status == 409 and attempt < _ATTEMPTS:  # another client writes or deletes it now
                _pause(attempt)
                continue
            if status == 501 and _head(bucket, key) is None:  # no conditional writes here
                _send(place, body)
            elif status not in (412, 501):
                raise
        break
    into = io.BytesIO()
    _fetch(place, into)
    return into.getvalue()


def _fetch(
    place: tuple[str, str], into: _File, part: range | None = None, tag: str | None = None
) -> None:
    """Write an object into an empty file, going on where a connection broke.

    Bytes of two states of the object are never mixed: if it was replaced, all begins again.

    Args:
        place: bucket and key.
        into: the file.
        part: the bytes wanted, where not all; fewer come if the object ends before.
        tag: ETag of the only state that will do; any will without it.

    Raises:
        Unavailable: the connection broke too often with nothing gained.
        UserError: the object is not what its digest says, or there is no state with the tag.
    """
    from botocore import exceptions as aws
    from urllib3.exceptions import HTTPError

    broken = (aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError, HTTPError)
    uri = f"s3://{'/'.join(place)}"
    begin, end = (part.start, part.stop - 1) if part else (0, "")
    state, total, most, failures = tag, 0, 0, 0
    while True:
        held, damaged, answer = into.tell(), False, None
        ask: dict[str, Any] = {"IfMatch": state} if state else {}
        if held or part:
            ask["Range"] = f"bytes={begin + held}-{end}"
        try:
            answer = s3_client().get_object(Bucket=place[0], Key=place[1], **ask)
        except aws.ClientError as error:
            status = _status(error)
            if status == 416 and not held:
                return  # it ends before the part begins
            if status not in (412, 416):
                raise
        if answer is None or not _goes_on(answer, state, begin + held if "Range" in ask else None):
            if tag:
                raise UserError(f"{uri} was replaced while it was read: begin again.")
            why, state = "it was replaced", None
            _empty(into)
        else:
            if not held:
                state, total = answer["ETag"], answer["ContentLength"]
            why = "it ended too early"
            try:
                for chunk in answer["Body"].iter_chunks(_CHUNK):
                    into.write(chunk)
            except aws.FlexibleChecksumError:
                damaged = True
            except broken as error:
                why = str(error)
            finally:
                answer["Body"].close()
            if into.tell() >= total:
                wanted = None if part else answer["Metadata"].get(_DIGEST)
                if not damaged and into.tell() == total and wanted in (None, _sha256(into)):
                    return
                damaged = True
                why = "its bytes are not those of its digest"
                _empty(into)
        # Only new bytes are progress: an object that is replaced again and again ends this too.
        failures = 1 if into.tell() > most else failures + 1
        most = max(most, into.tell())
        if failures > _ATTEMPTS:
            if damaged:
                raise UserError(f"{uri} is damaged (wrong sha256): write it again.")
            raise Unavailable(
                f"Reading {uri} was cut off again and again ({why}): try again later."
            )
        log.info("reading %s continues at byte %d: %s", uri, into.tell(), why)
        _pause(failures)


def _goes_on(answer: Mapping[str, Any], state: str | None, start: int | None) -> bool:
    """Return whether an answer is of the state wanted and begins where it should."""
    if state not in (None, answer["ETag"]):
        return False
    return start is None or answer.get("ContentRange", "").startswith(f"bytes {start}-")


class _Remote(io.RawIOBase):
    """An object as a file to seek in; every read is a request, so put a buffer before it."""

    def __init__(self, uri: str | Path, place: tuple[str, str], found: Mapping[str, Any]) -> None:
        """Take the answer to a HEAD request: no other state of the object will be read."""
        super().__init__()
        self._uri, self._place = uri, place
        self._size, self._tag = found["ContentLength"], found["ETag"]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        at = bases[whence] + offset
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as a local file does
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._next(self._size)

    def _next(self, length: int) -> bytes:
        part = range(self._at, min(self._at + length, self._size))
        if not part:
            return b""
        into = io.BytesIO()
        with _reported(self._uri):
            _fetch(self._place, into, part, self._tag)
        self._at += into.tell()
        return into.getvalue()


def _sha256(file: _File) -> str:
    """Return the digest of a whole file, and leave it at its end."""
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
    file.seek(0, os.SEEK_END)
    return digest


def _empty(file: _File) -> None:
    file.seek(0)
    file.truncate()


def _pause(failures: int) -> None:
    """Wait, longer after each failure, and not as long as others who failed at the same time."""
    time.sleep(min(_LONGEST_PAUSE, 0.1 * 2**failures) * _jitter.uniform(0.5, 1))


def _status(error: Any) -> int:
    """Return the HTTP status of botocore's ClientError, or 0."""
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def _too_short(uri: str | Path, stop: int) -> UserError:
    return UserError(f"{uri} ends before byte {stop}, so it is cut off: write it again.")


@contextlib.contextmanager
def _beside(place: Path) -> Iterator[IO[bytes]]:
    """Yield a new file in the same folder, and leave no trace of it: link or rename it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=place.parent, prefix=f".{place.name}.", delete=False
    ) as file:
        try:
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)


def _finish(file: IO[bytes]) -> Path:
    """Close a file of ``_beside``, make it readable by all, and return its path."""
    file.close()
    path = Path(file.name)
    path.chmod(0o644)
    return path


@contextlib.contextmanager
def _reported(uri: str | Path) -> Iterator[None]:
    """Turn errors of a place that a user can fix into a UserError."""
    if isinstance(_parse(uri), Path):
        with _reported_local(uri):
            yield
        return
    from botocore import exceptions as aws

    at = s3_settings()["endpoint"] or "AWS"
    try:
        yield
    except (aws.NoCredentialsError, aws.PartialCredentialsError) as error:
        raise UserError(
            f"There are no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error
    except (aws.ConnectionError, aws.HTTPClientError) as error:
        raise Unavailable(
            f"The object store at {at} does not answer for {uri}: check AWS_ENDPOINT_URL."
        ) from error
    except aws.ParamValidationError as error:
        what = str(error).replace("\n", " ").partition(": Bucket name must")[0]
        raise UserError(f"{uri} is no valid place in an object store: {what}.") from error
    except aws.ClientError as error:
        reported = _refusal(error, uri, at)
        if reported is None:
            raise
        raise reported from error


def _refusal(error: Any, uri: str | Path, at: str) -> UserError | None:
    """Return the error to raise for botocore's ClientError, or None if no user can fix it."""
    code, status = error.response["Error"]["Code"], _status(error)
    bucket = str(uri).removeprefix("s3://").partition("/")[0]
    missing = code in ("404", "NotFound", "NoSuchKey")
    if code == "NoSuchBucket" or (missing and not _bucket_exists(bucket)):
        return UserError(f"There is no bucket {bucket!r} at {at}: create it or correct {uri}.")
    if missing:
        return UserError(f"There is no file {uri}: correct the URI.")
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return UserError(
            f"Access to {uri} at {at} was denied: check AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and what they may do."
        )
    if code in _GARBLED:
        return Unavailable(f"{uri} was changed on its way to {at} ({code}): try again.")
    if (status >= 500 and status != 501) or status == 429 or code in _BUSY:
        return Unavailable(f"The object store at {at} cannot serve {uri} now ({code}): try later.")
    return None


@contextlib.contextmanager
def _reported_local(path: str | Path) -> Iterator[None]:
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
    except OSError as error:
        if error.errno not in _LOCAL:
            raise
        raise UserError(_LOCAL[error.errno].format(path=path)) from error


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _replace_folder(source: Path, target: Path) -> None:
    """Copy beside the target and rename, so that a reader sees a whole folder or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as beside:
        fresh = Path(beside) / "new"
        fresh.mkdir()
        for path in _files(source):  # copytree would hide why a file could not be copied
            copy = fresh / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        if target.exists():
            target.rename(Path(beside) / "old")
        fresh.rename(target)
