"""The exception of errors that a user can fix."""

import re

# The last @ before a slash ends a user and password; without one, a password may hold slashes.
_USER = re.compile(r"(?<=://)[^/\s:@]*(?::(?:[^/\s]*|\S*))?@")
_QUERY = re.compile(
    r"([?&;][^=&\s]*(?:pass|pwd|user|token|secret|key|sig|cred)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)


def public(text: str) -> str:
    """Return a URI, or a text with URIs, without the user, password and keys it may carry."""
    return _QUERY.sub(r"\1…", _USER.sub("", text))


class UserError(Exception):
    """A mistake in a flag, a file or a setting, reported in one sentence with its remedy.

    Every command prints the sentence on stderr and ends with exit status 2, without a traceback.
    Credentials in URIs are left out. Mistakes of ours are assertions instead.
    """

    def __str__(self) -> str:
        return public(super().__str__())
