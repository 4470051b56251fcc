"""The exception of errors that a user can fix."""


class UserError(Exception):
    """A mistake in a flag, a file or a setting, reported in one sentence with its remedy.

    Every command prints the sentence on stderr and ends with exit status 2, without a traceback.
    Mistakes of ours are assertions instead.
    """
