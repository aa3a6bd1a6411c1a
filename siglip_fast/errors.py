"""What the user can put right, how an error is told in one line, and a check that several make."""

import re
from typing import Any


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


def check_counts(**counts: Any) -> None:
    """Raises ValueError unless each is a positive integer, or a sequence of such."""
    for name, value in counts.items():
        for count in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: expected positive integers, got {count!r}")
