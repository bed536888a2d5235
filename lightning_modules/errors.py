"""The one exception that means: the user's input is at fault, and the message says how to cure it."""


class UserInputError(ValueError):
    """Bad configuration, data, checkpoint, run id or store URI.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """
