"""Escape file and class names for the terminal, in which control characters move the cursor or turn text around."""

from __future__ import annotations

import re

# Control characters, line and paragraph separators, and the marks that change the direction of the following text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escape_controls(line: str) -> str:
    r"""Return a line of output with control characters as escapes, such as ``\n``."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), line)
