"""Objects in an S3 store, by boto3 and its transfer manager.

Uploads carry a SHA-256 for the store to check. The same digest is among the object's metadata,
where reads of the whole object check it again: not every store does.
"""

import errno
import functools
import io
import logging
import os
from collections.abc import Mapping
from typing import IO, Any

from ivegan.errors import UserError
from ivegan.storage.digest import file_sha256, sha256_hex
from ivegan.storage.errors import MISSING, Unavailable, sentences
from ivegan.storage.places import Object, s3_settings

log = logging.getLogger(__name__)

ATTEMPTS = 5  # of each request, with botocore's exponential back-off between them
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 30  # seconds
READ_AHEAD = 1 << 20
_DIGEST = "sha256"  # key of the metadata
_File = io.BytesIO | IO[bytes]


def s3_client() -> Any:
    """Return this process's boto3 client for the resolved endpoint.

    Raises:
        UserError: the endpoint is not a URL.
    """
    settings = s3_settings()
    return client(settings["endpoint"], settings["region"], os.getpid())


@functools.lru_cache(maxsize=4)
def client(endpoint: str | None, region: str, process: int) -> Any:
    """Return a boto3 client; one per process, because connections do not survive a fork."""
    from boto3.session import Session
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_TIMEOUT,
        read_timeout=READ_TIMEOUT,
        # the digest of whole objects is checked here; the transfer manager then needs no HEAD
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    try:
        # a session of its own: boto3's default one keeps credentials that have changed since
        return Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except ValueError as error:
        raise UserError(
            f"AWS_ENDPOINT_URL is {endpoint!r}, which is no URL: write http://HOST:PORT."
        ) from error


def head(place: Object) -> Mapping[str, Any] | None:
    """Return the answer to a HEAD request, or None if there is no such object."""
    from botocore.exceptions import ClientError

    try:
        return s3_client().head_object(Bucket=place[0], Key=place[1])
    except ClientError as error:
        if error.response["Error"]["Code"] in MISSING:
            return None
        raise


def require(place: Object) -> Mapping[str, Any]:
    """Return the answer to a HEAD request.

    Raises:
        UserError: there is no such object.
    """
    answer = head(place)
    if answer is None:
        # HEAD does not tell a missing bucket from a missing object; a list raises NoSuchBucket.
        s3_client().list_objects_v2(Bucket=place[0], MaxKeys=1)
        raise UserError(f"There is no file {_uri(place)}: correct the URI.")
    return answer


def list_objects(place: Object) -> dict[str, int]:
    """Return all objects below a prefix: relative name -> bytes."""
    bucket, key = place
    prefix = f"{key}/" if key else ""
    pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    contents = [item for page in pages for item in page.get("Contents", [])]
    return {item["Key"].removeprefix(prefix): item["Size"] for item in contents}


def upload(place: Object, body: _File) -> None:
    """Upload an open file, in several requests if it is large."""
    extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {_DIGEST: file_sha256(body)}}
    body.seek(0)
    s3_client().upload_fileobj(body, *place, ExtraArgs=extra)


def create(place: Object, data: bytes) -> None:
    """Upload an object, unless there is one."""
    from botocore.exceptions import ClientError

    extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {_DIGEST: sha256_hex(data)}}
    try:
        s3_client().put_object(Bucket=place[0], Key=place[1], Body=data, IfNoneMatch="*", **extra)
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == 501 and head(place) is None:  # a store without conditional writes
            upload(place, io.BytesIO(data))
        elif status not in (409, 412, 501):  # 409: another client writes it at this moment
            raise


def download(place: Object, file: _File) -> None:
    """Download an object into an empty file and check its digest.

    Raises:
        UserError: there is no such object, or it is not what its digest says.
    """
    from boto3.s3.transfer import TransferConfig
    from s3transfer.exceptions import S3DownloadFailedError

    config = TransferConfig(num_download_attempts=ATTEMPTS)
    replaced = False
    for _ in range(max(2, ATTEMPTS)):
        digest = require(place)["Metadata"].get(_DIGEST)
        try:
            s3_client().download_fileobj(*place, file, Config=config)
            replaced = False
        except S3DownloadFailedError:
            replaced = True  # between two requests of the transfer manager
        if not replaced and digest in (None, file_sha256(file)):
            return
        log.info("reading %s again: its bytes differ from its digest", _uri(place))
        file.seek(0)
        file.truncate()
    if replaced:
        raise Unavailable(f"{_uri(place)} was replaced again while it was read: try later.")
    raise UserError(f"{_uri(place)} is damaged (wrong sha256): write it again.")


class ObjectFile(io.RawIOBase):
    """An object as a seekable file; every read is a request, so wrap it into a buffer."""

    def __init__(self, place: Object) -> None:
        super().__init__()
        answer = require(place)
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
            data = self._read(stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _read(self, stop: int) -> bytes:
        from botocore import exceptions as aws

        for attempt in range(1, ATTEMPTS + 1):  # botocore does not repeat the reading of a body
            try:
                answer = s3_client().get_object(
                    **self._object, Range=f"bytes={self._position}-{stop - 1}"
                )
                return answer["Body"].read()
            except (aws.HTTPClientError, aws.IncompleteReadError):
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")


def delete_objects(place: Object, first: str | None) -> None:
    """Delete all objects below a prefix, one of them before all others."""
    bucket, key = place
    assert key, "a whole bucket is never deleted"
    names = sorted(list_objects(place), key=lambda name: (name != first, name))
    batches = [names[:1], *(names[i : i + 1000] for i in range(1, len(names), 1000))]
    for batch in filter(None, batches):
        keys = [{"Key": f"{key}/{name}"} for name in batch]
        s3_client().delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})


def _uri(place: Object) -> str:
    return f"s3://{'/'.join(place)}"
