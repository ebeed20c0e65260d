"""The one exception a user sees: a single line saying what, where and what to do."""


class UserError(Exception):
    """Bad input or a request that cannot be met; the command line prints it and exits with code 2."""


def check_seed(seed: int) -> None:
    """Refuses seeds that one of the generators here (random, numpy, torch) would not take."""
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed must be between 0 and 2147483647, got {seed}")
