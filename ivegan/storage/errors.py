"""Errors of disks and object stores as sentences, and waiting for a store that is unavailable."""

import contextlib
import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ivegan.errors import UserError
from ivegan.storage.places import is_local

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 120.0  # seconds that long work waits for a store
LONGEST_PAUSE = 5.0  # seconds between two attempts
_jitter = random.SystemRandom()  # not the generator that a training seeds


class Unavailable(UserError):  # noqa: N818
    """The object store does not answer, or is busy: a later attempt may succeed."""


_NO_SPACE = "No space is left for {path}: free some, or choose another place."
_IN_THE_WAY = "{path} cannot be a folder: a file stands in its way."
_FORBIDDEN = "{path} may not be read or written: change its permissions."
_LOCAL = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: "{path} grows larger than files may be here: choose another place.",
    errno.EROFS: "{path} lies on a disk that is read-only: choose another place.",
    errno.ENAMETOOLONG: "The name {path} is too long: choose a shorter one.",
    errno.ENOENT: "There is no file {path}: correct the path.",
    errno.EISDIR: "{path} is a folder where a file is expected.",
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EEXIST: _IN_THE_WAY,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
}
MISSING = ("404", "NotFound", "NoSuchKey")
_BUSY = (
    *("ConditionalRequestConflict", "RequestTimeout", "SlowDown", "Throttling"),
    *("ThrottlingException", "TooManyRequests", "busy"),
)
_DENIED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch")
_EXPIRED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_REGION = ("301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException",
           "PermanentRedirect")  # fmt: skip
_CHANGED = ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
_REMOTE: list[tuple[tuple[str, ...], type[UserError], str]] = [
    (("NoSuchBucket",), UserError, "There is no bucket {bucket!r} at {store}: create it or correct "
     "{uri}."),
    (MISSING, UserError, "There is no file {uri}: correct the URI."),
    (("412", "PreconditionFailed"), UserError, "{uri} was replaced while it was read: begin "
     "again."),
    (_DENIED, UserError, "Access to {uri} at {store} was denied: check AWS_ACCESS_KEY_ID, "
     "AWS_SECRET_ACCESS_KEY and what they may do."),
    (_EXPIRED, UserError, "The credentials for {uri} at {store} have expired or are of another "
     "account ({code}): get new ones, for AWS_SESSION_TOKEN too."),
    (_REGION, UserError, "{uri} is not in the region that was asked at {store} ({code}): set "
     "AWS_DEFAULT_REGION to the bucket's."),
    (("InvalidBucketName",), UserError, "{store} takes no bucket named {bucket!r}: correct {uri}."),
    (("RequestTimeTooSkewed",), UserError, "This machine's clock differs from that of {store}: set "
     "it."),
    (_CHANGED, Unavailable, "{uri} was changed on its way to {store} ({code}): try again."),
    (_BUSY, Unavailable, "The object store at {store} cannot serve {uri} now ({code}): try later."),
]  # fmt: skip


def patiently(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of a call, repeated while the store is unavailable.

    For long work that a restart of the store should not end. The first access of a command should
    fail at once instead: the address may be wrong.

    Raises:
        Unavailable: for ``PATIENCE`` seconds since the first failure.
    """
    first, failures = 0.0, 0
    while True:
        try:
            return call(*args, **kwargs)
        except Unavailable as error:
            failures += 1
            now = time.monotonic()
            first = first if failures > 1 else now
            if now - first >= PATIENCE:
                raise
            log.warning("%s Trying again: failure %d.", error, failures)
            # Random, so that workers that failed together do not come back together.
            time.sleep(min(LONGEST_PAUSE, 0.1 * 2**failures) * _jitter.uniform(0.5, 1))


@contextlib.contextmanager
def sentences(uri: str | Path) -> Iterator[None]:
    """Turn errors that a user can fix into a UserError that names the place."""
    with local_sentences(uri) if is_local(uri) else _remote_sentences(str(uri)):
        yield


@contextlib.contextmanager
def local_sentences(path: str | Path) -> Iterator[None]:
    """Turn errors of a disk into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LOCAL:
            raise
        raise UserError(_LOCAL[error.errno].format(path=path)) from error


@contextlib.contextmanager
def _remote_sentences(uri: str) -> Iterator[None]:
    from botocore import exceptions as aws
    from s3transfer.exceptions import RetriesExceededError

    from ivegan.storage.objects import s3_client

    store = s3_client().meta.endpoint_url
    try:
        yield
    except (aws.NoCredentialsError, aws.PartialCredentialsError) as error:
        raise UserError(
            f"There are no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error
    except (RetriesExceededError, aws.IncompleteReadError) as error:
        raise Unavailable(f"Reading {uri} was cut off again and again: try again later.") from error
    except aws.SSLError as error:
        raise UserError(
            f"The certificate of the object store at {store} is not trusted: set AWS_CA_BUNDLE to "
            "the file of its authority."
        ) from error
    except aws.ProxyConnectionError as error:
        raise Unavailable(
            f"The proxy on the way to {store} does not answer ({error}): correct HTTPS_PROXY, or "
            "name the store in NO_PROXY."
        ) from error
    except (aws.ConnectionError, aws.HTTPClientError) as error:
        raise Unavailable(
            f"The object store at {store} does not answer for {uri}: check AWS_ENDPOINT_URL."
        ) from error
    except aws.ClientError as error:
        sentence = refusal(error, uri, store)
        if sentence is None:
            raise
        raise sentence from error
    except aws.BotoCoreError as error:  # of credentials, for example that no role gives
        raise UserError(f"{uri} at {store} cannot be asked for ({error}): correct that.") from error


def refusal(error: Any, uri: str, store: str) -> UserError | None:
    """Return the sentence for botocore's ClientError, or None if no user can fix it."""
    code = kind = error.response["Error"]["Code"]
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if (status >= 500 and status != 501) or status == 429:
        kind = "busy"
    bucket = uri.removeprefix("s3://").partition("/")[0]
    for codes, error_type, sentence in _REMOTE:
        if kind in codes:
            return error_type(sentence.format(uri=uri, store=store, code=code, bucket=bucket))
    return None
