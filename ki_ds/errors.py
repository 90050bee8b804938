"""What a user can put right, and what a launched stage could not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice

MOST_LISTED = 20  # problems that are said at once


class UserError(Exception):
    """A mistake in the input, with the place, what was found, what was expected and the remedy.

    The command line prints the message without a traceback and exits with code 2.
    """


class StageFailed(Exception):
    """A launched stage ended without sealing its folder; `code` is the exit code to pass on."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def nearest(name: str, allowed: Iterable[str]) -> str:
    """`'; did you mean "x"?'` for the closest of the allowed names, or an empty string."""
    close = difflib.get_close_matches(name[:200], islice(allowed, 1000), n=1, cutoff=0.5)  # its time: both lengths
    return f'; did you mean "{close[0]}"?' if close else ""


def listed(problems: Iterable[str]) -> list[str]:
    """The first problems; where there are more, a last line says so. The others are not even looked for."""
    first = list(islice(problems, MOST_LISTED + 1))
    return first if len(first) <= MOST_LISTED else [*first[:MOST_LISTED], "more problems, which are not listed"]


def some(names: Iterable[str]) -> str:
    """Names in a row, with an ellipsis where there are too many for a line."""
    first = list(islice(names, MOST_LISTED + 1))
    return ", ".join(first[:MOST_LISTED]) + (", …" if len(first) > MOST_LISTED else "")


def reason(error: BaseException) -> str:
    """The first line of what a library's exception says, and the next where that one ends with a colon."""
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    first, _, rest = text.strip().partition("\n")
    first += " " + rest.strip().partition("\n")[0] if first.endswith(":") else ""
    return first[:300] or type(error).__name__


def unreadable(name: str, error: Exception) -> UserError:
    """The error of a file that cannot be read."""
    if isinstance(error, PermissionError):
        remedy = "make it readable for this user"
    else:
        remedy = "it may be cut short, damaged or not what its ending says: fetch it again, or leave it out"
    return UserError(f"{name}: cannot be read: {reason(error)}; {remedy}")
