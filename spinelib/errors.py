"""Errors meant for users: each says what was expected, what was given and how to mend it."""


class SpinelibError(Exception):
    """A problem the user can mend; the command line prints it and exits with code 2."""


class InputError(SpinelibError, ValueError):
    """An input file, image, table or parameter is not usable."""
