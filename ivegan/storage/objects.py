"""Objects in an S3 store, by boto3 and its transfer manager.

Uploads carry a SHA-256 for the store to check. The same digest is among the object's metadata,
where reads of the whole object check it again: not every store does.
"""

import errno
import functools
import hashlib
import io
import logging
import os
from collections.abc import Mapping
from typing import IO, Any

from ivegan.errors import UserError
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


def bucket_exists(bucket: str) -> bool:
    """Return False if the store answers that there is no such bucket."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        s3_client().head_bucket(Bucket=bucket)
    except ClientError as error:
        return error.response["Error"]["Code"] not in ("404", "NoSuchBucket")
    except BotoCoreError as error:
        log.debug("no answer about the bucket %s: %s", bucket, error)
    return True


def list_objects(place: Object) -> dict[str, int]:
    """Return all objects below a prefix: relative name -> bytes."""
    bucket, key = place
    prefix = f"{key}/" if key else ""
    pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    contents = [item for page in pages for item in page.get("Contents", [])]
    return {item["Key"].removeprefix(prefix): item["Size"] for item in contents}


def upload(place: Object, body: _File) -> None:
    """Upload an open file, in several requests if it is large."""
    extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {_DIGEST: _sha256(body)}}
    body.seek(0)
    s3_client().upload_fileobj(body, *place, ExtraArgs=extra)


def create(place: Object, data: bytes) -> None:
    """Upload an object, unless there is one."""
    from botocore.exceptions import ClientError

    metadata = {_DIGEST: hashlib.sha256(data).hexdigest()}
    try:
        s3_client().put_object(
            Bucket=place[0],
            Key=place[1],
            Body=data,
            ChecksumAlgorithm="SHA256",
            Metadata=metadata,
            IfNoneMatch="*",
        )
    except ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status == 501 and head(place) is None:  # a store without conditional writes
            upload(place, io.BytesIO(data))
        elif status not in (409, 412, 501):  # 409: another client writes it at this moment
            raise


def download(place: Object, file: _File) -> None:
    """Download an object into an empty file and check its digest.

    Raises:
        UserError: the object is not what its digest says.
    """
    from boto3.s3.transfer import TransferConfig
    from s3transfer.exceptions import S3DownloadFailedError

    uri = f"s3://{'/'.join(place)}"
    config = TransferConfig(num_download_attempts=ATTEMPTS)
    replaced = False
    for _ in range(max(2, ATTEMPTS)):
        metadata = s3_client().head_object(Bucket=place[0], Key=place[1])["Metadata"]
        try:
            s3_client().download_fileobj(*place, file, Config=config)
            replaced = False
        except S3DownloadFailedError:
            replaced = True  # between two requests of the transfer manager
        if not replaced and metadata.get(_DIGEST) in (None, _sha256(file)):
            return
        log.info("reading %s again: its bytes differ from its digest", uri)
        file.seek(0)
        file.truncate()
    if replaced:
        raise Unavailable(f"{uri} was replaced again while it was read: try later.")
    raise UserError(f"{uri} is damaged (wrong sha256): write it again.")


def read_part(place: Object, start: int, stop: int, etag: str | None = None) -> bytes:
    """Return the bytes of an object from start to stop, fewer if it ends before.

    Args:
        place: bucket and key.
        start: the first byte.
        stop: the byte after the last.
        etag: of the only state of the object to read; any state by default.
    """
    from botocore import exceptions as aws

    state = {"IfMatch": etag} if etag else {}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            answer = s3_client().get_object(
                Bucket=place[0], Key=place[1], Range=f"bytes={start}-{stop - 1}", **state
            )
            return answer["Body"].read()
        except aws.ClientError as error:
            code = error.response["Error"]["Code"]
            if code in ("InvalidRange", "416"):
                return b""
            if code in ("PreconditionFailed", "412"):
                uri = f"s3://{'/'.join(place)}"
                raise UserError(f"{uri} was replaced while it was read: begin again.") from error
            raise
        except (aws.HTTPClientError, aws.IncompleteReadError):
            if attempt == ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


class ObjectFile(io.RawIOBase):
    """An object as a seekable file; every read is a request, so wrap it into a buffer."""

    def __init__(self, uri: str, place: Object, answer: Mapping[str, Any]) -> None:
        """Take the answer to a HEAD request: only this state of the object is read."""
        super().__init__()
        self._uri, self._place = uri, place
        self._size, self._etag = answer["ContentLength"], answer["ETag"]
        self._position = 0

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
        with sentences(self._uri):
            data = read_part(self._place, self._position, stop, self._etag)
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
        s3_client().delete_objects(Bucket=bucket, Delete={"Objects": keys, "Quiet": True})


def _sha256(file: _File) -> str:
    """Return the digest of a whole file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
