"""The one kind of error that is told to the user in a line, without a traceback. Imports nothing, for every worker loads it."""


class UserError(ValueError):
    """A mistake of the user: the message is one line that says what would be right."""
