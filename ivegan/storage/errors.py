"""Errors of disks and object stores as sentences."""

import contextlib
import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ivegan.errors import UserError
from ivegan.storage.places import Object, parse


class Unavailable(UserError):  # noqa: N818
    """The object store does not answer, or is busy: a later attempt may succeed."""


class Missing(UserError):  # noqa: N818
    """There is no such file."""


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
_CHANGED = ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch")
_REFUSED = (
    "The object store at {store} refuses {uri} ({code}: {message}): correct the URI, the region, "
    "the credentials or this machine's clock."
)
_REMOTE: list[tuple[tuple[str, ...], type[UserError], str]] = [
    (("NoSuchBucket",), UserError, "There is no bucket {bucket!r} at {store}: create it or correct "
     "{uri}."),
    (MISSING, Missing, "There is no file {uri}: correct the URI."),
    (("412", "PreconditionFailed"), UserError, "{uri} was replaced while it was read: begin "
     "again."),
    (_DENIED, UserError, "Access to {uri} at {store} was denied: check AWS_ACCESS_KEY_ID, "
     "AWS_SECRET_ACCESS_KEY and what they may do."),
    (_CHANGED, Unavailable, "{uri} was changed on its way to {store} ({code}): try again."),
    (_BUSY, Unavailable, "The object store at {store} cannot serve {uri} now ({code}): try later."),
]  # fmt: skip


@contextlib.contextmanager
def sentences(uri: str | Path) -> Iterator[Path | Object]:
    """Yield the place of a URI, and turn errors that a user can fix into a UserError."""
    place = parse(uri)
    with local_sentences(uri) if isinstance(place, Path) else _remote_sentences(str(uri)):
        yield place


@contextlib.contextmanager
def local_sentences(path: str | Path) -> Iterator[None]:
    """Turn errors of a disk into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LOCAL:
            raise
        kind = Missing if error.errno == errno.ENOENT else UserError
        raise kind(_LOCAL[error.errno].format(path=path)) from error


@contextlib.contextmanager
def _remote_sentences(uri: str) -> Iterator[None]:
    from botocore import exceptions as aws

    from ivegan.storage.objects import s3_client

    store = s3_client().meta.endpoint_url
    try:
        yield
    except (aws.NoCredentialsError, aws.PartialCredentialsError) as error:
        raise UserError(
            f"There are no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        ) from error
    except (aws.ResponseStreamingError, aws.IncompleteReadError) as error:
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
        raise refusal(error.response, uri, store) from error
    except aws.BotoCoreError as error:  # of credentials, for example that no role gives
        raise UserError(f"{uri} at {store} cannot be asked for ({error}): correct that.") from error


def refusal(answer: Mapping[str, Any], uri: str, store: str) -> UserError:
    """Return the sentence for an answer of the store that is an error."""
    error = answer.get("Error", {})
    code = kind = error.get("Code", "")
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if (status >= 500 and status != 501) or status == 429:
        kind = "busy"
    words = {
        "uri": uri,
        "store": store,
        "code": code,
        "message": error.get("Message", "").rstrip("."),
    }
    words["bucket"] = uri.removeprefix("s3://").partition("/")[0]
    for codes, error_type, sentence in _REMOTE:
        if kind in codes:
            return error_type(sentence.format(**words))
    return UserError(_REFUSED.format(**words))
