"""The one exception for mistakes a user can mend."""


class InputError(ValueError):
    """Bad input: a config value, a path, a solver setting, a corpus, a checkpoint.

    The message is one sentence that names the value and the remedy. The entry scripts print it and exit with code 2.
    """
