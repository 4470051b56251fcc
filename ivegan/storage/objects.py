"""Objects in an S3 store, by boto3.

Uploads carry a SHA-256 for the store to check. The same digest is among the object's metadata,
where reads of the whole object check it again: not every store does.
"""

import contextlib
import errno
import functools
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ivegan.errors import UserError
from ivegan.storage.digest import sha256_hex
from ivegan.storage.errors import MISSING, Unavailable, refusal, sentences
from ivegan.storage.places import Object
from ivegan.storage.schema import DamagedError

log = logging.getLogger(__name__)

ATTEMPTS = 5  # of each request: three seconds
_RETRIES = {"AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "22"}  # two minutes
LONGEST_PAUSE = 7.0  # seconds between two attempts
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds
READ_AHEAD = 1 << 20
_DIGEST = "sha256"  # key of the metadata


def s3_client() -> Any:
    """Return this process's boto3 client.

    Raises:
        UserError: no client can be made as variables and files of AWS describe it.
    """
    return _client(_variables(), os.getpid(), ATTEMPTS)


@contextlib.contextmanager
def longer_retries() -> Iterator[None]:
    """Repeat requests for two minutes while the block runs, in the processes it starts too.

    Other accesses end within seconds, because a command's first one may have a wrong address.
    AWS_MAX_ATTEMPTS and AWS_RETRY_MODE of the user are left as they are.
    """
    chosen = {} if any(name in os.environ for name in _RETRIES) else _RETRIES
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            os.environ.pop(name, None)


def environment() -> dict[str, str]:
    """Return the variables that lead other programs and nodes to the same store; never its keys.

    Where the description is wrong there are none: S3 may not be used at all.
    """
    try:
        session, region, endpoint = _session(_variables())
    except UserError:
        return {}
    variables = {"AWS_REGION": region, "AWS_DEFAULT_REGION": region}
    variables |= {name: os.environ[name] for name in _RETRIES if name in os.environ}
    if endpoint:
        everything = os.environ.get("AWS_ENDPOINT_URL") == endpoint
        variables["AWS_ENDPOINT_URL" if everything else "AWS_ENDPOINT_URL_S3"] = endpoint
        variables["METAFLOW_S3_ENDPOINT_URL"] = endpoint  # Argo's pods get it alone
    if style := (session.get_config_variable("s3") or {}).get("addressing_style"):
        variables["MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"] = style  # whose default would replace it
    return variables


def _variables() -> tuple[tuple[str, str], ...]:
    """Return the variables on which a client depends."""
    own = ("HOME", "MLFLOW_S3_ENDPOINT_URL")
    found = os.environ.items()
    return tuple((k, v) for k, v in found if k[:4] == "AWS_" or k in own or "proxy" in k.lower())


@functools.lru_cache(maxsize=4)
def _session(variables: tuple[tuple[str, str], ...]) -> tuple[Any, str, str | None]:
    """Return a session of botocore, the region that it finds and the endpoint, None for AWS."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    given = dict(variables)
    try:
        session = Session()
        region = session.get_config_variable("region") or given.get("AWS_REGION") or "us-east-1"
        found = []
        for ignore in (True, False):  # with a key, or it would be looked for in the network
            keys = dict.fromkeys(("aws_access_key_id", "aws_secret_access_key"), "none")
            config = Config(ignore_configured_endpoint_urls=True) if ignore else None
            client = session.create_client("s3", region_name=region, config=config, **keys)
            found.append(client.meta.endpoint_url)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"The settings of S3 are wrong ({error}): correct them.") from error
    own = given.get("MLFLOW_S3_ENDPOINT_URL") or None
    return session, region, own if found[0] == found[1] else found[1]


@functools.lru_cache(maxsize=4)
def _client(variables: tuple[tuple[str, str], ...], process: int, attempts: int) -> Any:
    """Return a boto3 client; one per process, because connections do not survive a fork."""
    from boto3.session import Session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    session, region, endpoint = _session(variables)
    try:
        total = int(session.get_config_variable("max_attempts") or attempts)
        config = Config(
            retries={"mode": "standard", "total_max_attempts": total},
            connect_timeout=CONNECT_TIMEOUT,
            read_timeout=READ_TIMEOUT,
            response_checksum_validation="when_required",  # of whole objects it is checked here
        )
        # a session of its own: boto3's default one keeps credentials that have changed since
        client = Session().client("s3", region, endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"The settings of S3 are wrong ({error}): correct them.") from error
    client.meta.events.register_first("needs-retry.s3", _repetition(total))
    return client


def _repetition(total: int) -> Callable[..., float | None]:
    """Return a handler that repeats requests to a store that is away, busy, or got wrong bytes.

    Botocore stops after a hundred repetitions of all threads of a process, which twelve use up in
    ten seconds, and repeats no upload whose bytes were changed on their way.
    """
    from botocore import exceptions as aws

    def pause(
        attempts: int, response: Any, caught_exception: Exception | None, endpoint: Any, **_: Any
    ) -> float | None:
        if response is None:
            problem: Any = caught_exception
            may_pass = isinstance(problem, aws.ConnectionError | aws.HTTPClientError)
        elif "Error" not in response[1] and response[0].status_code < 400:
            return None
        else:
            problem = refusal(response[1], "a request", endpoint.host)
            may_pass = isinstance(problem, Unavailable)
        if not may_pass or attempts >= total:
            return None
        if attempts >= ATTEMPTS:
            log.warning("Waiting for the object store, attempt %d: %s", attempts, problem)
        return min(LONGEST_PAUSE, 0.1 * 2**attempts)

    return pause


def head(place: Object) -> Mapping[str, Any] | None:
    """Return the answer to a HEAD request, or None if there is no such object."""
    from botocore.exceptions import ClientError

    try:
        return s3_client().head_object(Bucket=place[0], Key=place[1])
    except ClientError as error:
        if error.response["Error"]["Code"] in MISSING:
            return None
        raise


def list_objects(place: Object) -> dict[str, int]:
    """Return all objects below a prefix: relative name -> bytes."""
    prefix, pages = _pages(place)
    contents = [item for page in pages for item in page.get("Contents", [])]
    return {item["Key"].removeprefix(prefix): item["Size"] for item in contents}


def list_names(place: Object) -> list[str]:
    """Return the names directly below a prefix, of objects and of what others share, sorted."""
    prefix, pages = _pages(place, Delimiter="/")
    names: set[str] = set()
    for page in pages:
        found = [item["Key"] for item in page.get("Contents", [])]
        found += [item["Prefix"] for item in page.get("CommonPrefixes", [])]
        names |= {name.removeprefix(prefix).rstrip("/") for name in found}
    return sorted(names - {""})


def _pages(place: Object, **options: str) -> tuple[str, Iterable[Mapping[str, Any]]]:
    bucket, key = place
    prefix = f"{key}/" if key else ""
    paginator = s3_client().get_paginator("list_objects_v2")
    return prefix, paginator.paginate(Bucket=bucket, Prefix=prefix, **options)


def upload(place: Object, data: bytes) -> None:
    """Upload an object, in several requests if it is large."""
    client = s3_client()
    client.upload_fileobj(io.BytesIO(data), *place, ExtraArgs=_extra(client, data))


def create(place: Object, data: bytes) -> None:
    """Upload an object, unless there is one."""
    from botocore.exceptions import ClientError

    client, where = s3_client(), {"Bucket": place[0], "Key": place[1]}
    try:
        client.put_object(**where, Body=data, IfNoneMatch="*", **_extra(client, data))
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == 501 and head(place) is None:  # a store without conditional writes
            upload(place, data)
        elif status not in (409, 412, 501):  # 409: another client writes it at this moment
            raise


def download(place: Object) -> bytes:
    """Return an object's content after checking its digest.

    Raises:
        UserError: it is not what its digest says.
    """
    data = b""
    for _ in range(2):
        data, metadata = _read({"Bucket": place[0], "Key": place[1]})
        if metadata.get(_DIGEST) in (None, sha256_hex(data)):
            return data
        log.info("%s differs from its digest", _uri(place))
    raise DamagedError(f"{_uri(place)} is damaged (wrong sha256): write it again.", data)


def _read(request: dict[str, str]) -> tuple[bytes, Mapping[str, str]]:
    """Return the bytes and the metadata of the answer to a GET request."""
    from botocore import exceptions as aws

    for left in reversed(range(ATTEMPTS)):  # botocore does not repeat the reading of a body
        answer = s3_client().get_object(**request)
        try:
            return answer["Body"].read(), answer["Metadata"]
        except (aws.HTTPClientError, aws.IncompleteReadError):
            if not left:
                raise
    raise AssertionError("the last attempt returns or raises")


class ObjectFile(io.RawIOBase):
    """An object as a seekable file; every read is a request, so wrap it into a buffer."""

    def __init__(self, place: Object) -> None:
        super().__init__()
        answer = head(place)
        if answer is None:
            # HEAD does not tell a missing bucket from a missing object; a list raises NoSuchBucket.
            s3_client().list_objects_v2(Bucket=place[0], MaxKeys=1)
            raise UserError(f"There is no file {_uri(place)}: correct the URI.")
        self._size = answer["ContentLength"]
        # Only this state of the object is read.
        self._object = {"Bucket": place[0], "Key": place[1], "IfMatch": answer["ETag"]}
        self._place, self._position = place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {0: 0, 1: self._position, 2: self._size}[whence]
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # as a local file does
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        if stop <= self._position:
            return 0
        with sentences(_uri(self._place)):
            data, _ = _read(self._object | {"Range": f"bytes={self._position}-{stop - 1}"})
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def delete_objects(place: Object, first: str | None) -> None:
    """Delete all objects below a prefix, one of them before all others."""
    bucket, key = place
    assert key, "a whole bucket is never deleted"
    names = sorted(list_objects(place), key=lambda name: (name != first, name))
    batches = [names[:1], *(names[i : i + 1000] for i in range(1, len(names), 1000))]
    for batch in filter(None, batches):
        keys = [{"Key": f"{key}/{name}"} for name in batch]
        if _takes_checksums(client := s3_client()):
            answer = client.delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
            if errors := answer.get("Errors"):
                raise refusal({"Error": errors[0]}, _uri(place), client.meta.endpoint_url)
        else:  # a request for many needs one
            for one in keys:
                client.delete_object(Bucket=bucket, **one)


def _takes_checksums(client: Any) -> bool:
    """Return whether the store takes headers with checksums: AWS_REQUEST_CHECKSUM_CALCULATION."""
    return client.meta.config.request_checksum_calculation != "when_required"


def _extra(client: Any, data: bytes) -> dict[str, Any]:
    """Return the arguments of an upload that let its content be checked."""
    checked = {"ChecksumAlgorithm": "SHA256"} if _takes_checksums(client) else {}
    return {**checked, "Metadata": {_DIGEST: sha256_hex(data)}}


def _uri(place: Object) -> str:
    return f"s3://{'/'.join(place)}"
