"""Failed writes as one line that says where.

`write` does not name its file when the disk is full, numpy loses the reason, and safetensors and tokenizers raise types of their own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from smidgen.errors import UserError


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turns what libraries raise when a file in or at `place` cannot be written into a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{place} cannot be written: {reason(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # which tokenizers raises, and nobody else
            raise
        raise UserError(f"{place} cannot be written: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What went wrong, in the system's words where there are any.

    >>> reason(OSError(28, "No space left on device"))
    'No space left on device'
    >>> reason(OSError("4608 requested and 480 written"))
    'the disk is full (4608 requested and 480 written)'
    """
    if isinstance(error, OSError):
        return error.strerror or f"the disk is full ({error})"  # the latter is numpy's `tofile`: it had more to write than there was room
    return " ".join(str(error).split())
