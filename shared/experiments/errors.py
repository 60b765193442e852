"""One exception for everything the person at the keyboard can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a command, file or machine set-up: shown as its message alone, without a traceback."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """`unknown arm 'cocnut' (did you mean 'coconut'?); valid: coconut, cot`."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return UserError(f"unknown {kind} {name!r}{hint}; valid: {', '.join(names) or 'none'}")
