"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake in a flag, a file or a setting, told in one sentence that says what to do.

    Every command prints the sentence on stderr and ends with exit status 2, without a traceback.
    Mistakes of ours are assertions instead.
    """
