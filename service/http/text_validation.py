"""Reject text that cannot be stored or forwarded, before any handler uses it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from service.db.text import is_storable
from service.http.errors import Problem

CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_text(name: str, *texts: str, single_line: bool = False, code: str = "bad_parameter") -> None:
    """Raise Problem for text with a NUL or a lone surrogate.

    Args:
        name: Describes the text in the message, as "The parameter `class`".
        texts: The texts.
        single_line: Also reject control characters, for text that becomes an HTTP header.
        code: The problem's code.
    """
    if not is_storable(*texts):
        raise Problem(code, f"{name} contains a NUL character or an unpaired surrogate. Remove it.")
    if single_line and any(CONTROL.search(text) for text in texts):
        raise Problem(code, f"{name} contains a control character. Write it on one line.")


def check_items(kind: str, items: Iterable[tuple[str, str]], *, single_line: frozenset[str] = frozenset()) -> None:
    """Check the names and values of a query or a form. The values of ``single_line`` names must have no control characters."""
    for name, value in items:
        check_text(f"The name of a {kind}", name)
        check_text(f"The {kind} `{name[:40]}`", value, single_line=name in single_line)


def strings_in(document: object) -> Iterator[str]:
    """Yield every string of a JSON document, including the names in its objects."""
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, dict):
            yield from value
            pending.extend(value.values())


def describe(value: object) -> str:
    """Show a JSON value in a message, shortened. Lists and objects may be large or deep, so only their kind is shown."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return repr(value)[:40]
