"""The two exceptions that the entry scripts turn into one sentence."""


class InputError(Exception):
    """Bad input: a config value, a path, a solver setting, a corpus, a checkpoint.

    The message is one sentence that names the value and the remedy. The entry scripts print it and exit with code 2.
    """


class DivergedError(RuntimeError):
    """Training met a number that is not finite. The entry scripts print the message and exit with code 1."""
