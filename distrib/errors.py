"""Errors that the user can fix: one line, no traceback, exit code 2."""


class UserError(ValueError):
    """Wrong usage, bad data or a bad checkpoint. The message names the option or file, value and remedy."""


class OnAllRanks(Exception):
    """Carries an exception that every rank has raised, as its cause: the job need not end."""


EXIT_USAGE = 2
EXIT_REQUEUE = 85
EXIT_CRASH = 1
