"""Errors that a user can fix. Each says what, where, got, expected and the remedy.

The command line prints the message without a traceback and ends with the exit code.
"""


class UserError(Exception):
    """Anything wrong that a user can put right."""

    exit_code = 4

    def __str__(self) -> str:
        text = super().__str__()
        if text.startswith("Caught "):  # a loader process wraps the message in its traceback
            text = text.rpartition(f"{type(self).__name__}: ")[2].rstrip()
        return text


class UsageError(UserError):
    """A wrong command, key or value."""

    exit_code = 2


class MissingInputError(UserError):
    """A file that is not there, or is not what it should be."""

    exit_code = 3


class RunFailedError(UserError):
    """A run that could not continue."""

    exit_code = 4


class LostContactError(RunFailedError):
    """Another process of the run is gone, or does not answer: a new start may well succeed."""


class ImageError(ValueError):
    """One image that cannot be used, `reason: detail`; the run takes its neighbour instead."""


class SmallImageError(ImageError):
    """An image whose shorter side, `side` pixels, is smaller than the crop."""

    def __init__(self, message: str, side: int) -> None:
        super().__init__(message)
        self.side = side
