"""Find class names that probably mean the same class."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

MIN_SINGULAR_CHARS = 3


def find_similar(names: Iterable[str]) -> list[list[str]]:
    """Group names that differ only in case, spaces, underscores, hyphens, Unicode form, or a plural ending."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_key(name)].append(name)
    for key in sorted(groups, key=len):
        for plural in _plurals(key):
            if key in groups and plural in groups:
                groups[key] += groups.pop(plural)
    return [group for group in groups.values() if len(group) > 1]


def _key(name: str) -> str:
    visible = (c for c in unicodedata.normalize("NFKC", name).casefold() if unicodedata.category(c) != "Cf")
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", "".join(visible)).strip()


def _plurals(key: str) -> list[str]:
    if len(key) < MIN_SINGULAR_CHARS:
        return []
    return [f"{key}s", f"{key}es", *([f"{key[:-1]}ies"] if key.endswith("y") else [])]
