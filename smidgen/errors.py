"""The one exception a user sees: a single line saying what, where and what to do."""


class UserError(Exception):
    """Bad input or a request that cannot be met; the command line prints it and exits with code 2."""
