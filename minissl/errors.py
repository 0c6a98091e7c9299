"""The one exception for what the person at the keyboard can mend."""


class InputError(ValueError):
    """Bad input, said in one sentence: what is wrong and what to do. The command line prints it and exits with 2."""
