"""Errors that end a command in one line. A user's mistake exits with 2, a failure with 1."""


class MtpdError(Exception):
    """A failure: the message is one line that names the cause and the way out."""

    exit_code = 1


class UserError(MtpdError, ValueError):
    """Something the user gave is wrong: it names the key or file, the value and what is accepted."""

    exit_code = 2


class UnsupportedModel(UserError):
    """An architecture that heads cannot be built for, with the reason."""


class RankFailed(MtpdError):
    """Another process of the run has failed. The message is empty where another rank tells the user."""
