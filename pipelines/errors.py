"""The errors that are told in one line, without a traceback. Imports nothing, for every worker loads it."""


class UserError(ValueError):
    """A mistake of the user: the message is one line that says what would be right. Exit code 2."""


class StageFailed(RuntimeError):
    """What happened to a stage that may be nobody's mistake, and how to go on, in one line. Exit code 1."""
