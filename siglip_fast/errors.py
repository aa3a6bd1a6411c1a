"""What the user can put right, and how an error is told in one line."""

import re


class UserError(Exception):
    """What the user can put right: printed as one line, exit status 2."""


def first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[0]


def typed_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def without_folders(text: str) -> str:
    """For what may get published: a path's last part only."""
    return re.sub(r"(?<!\w)/(?:[^\s/'\"]+/)+", "", text)
