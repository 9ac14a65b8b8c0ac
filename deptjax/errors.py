"""The one exception that is meant for a person: a mistake in what they gave, said in one line with its remedy.

Library code raises `UserError`; the command line prints its message and exits with status 2, without a traceback.
A programming error (a wrong array rank, a broken invariant) stays a `ValueError` or `TypeError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What came, what was expected, and which field, file or flag to change. One line."""


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the known name closest to `name`, or an empty string.

    >>> nearest("prompt_lenght", ["prompt_length", "rank"])
    " Did you mean 'prompt_length'?"
    >>> nearest("dept", ["LoRA", "DePT"])
    " Did you mean 'DePT'?"
    >>> nearest("zzz", ["prompt_length"])
    ''
    """
    by_lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f" Did you mean '{by_lower[close[0]]}'?" if close else ""
