"""Errors that the user can fix: one line, no traceback, exit code 2."""


class UserError(ValueError):
    """Wrong usage, bad data or a bad checkpoint. The message names the option or file, value and remedy."""


class LaunchError(UserError):
    """How the ranks were started is wrong: every rank finds it, and only rank 0 prints it."""


class OnAllRanks(Exception):
    """Carries an exception that every rank has raised, as its cause: the job need not end."""


class RankLost(Exception):
    """A rank has died while this one waited for its device: what the device holds does not count."""


EXIT_USAGE = 2
EXIT_REQUEUE = 85
EXIT_CRASH = 1
