"""Parse a client's JSON, bounded before it is parsed: a few bytes of text become an object of dozens of bytes in memory."""

from __future__ import annotations

import json
from typing import Any

from service.http.errors import Problem
from service.http.text_validation import check_text, strings_in

# What a request may contain beside its photos: an id, parameters, fields that other clients send.
OTHER_VALUES = 1_000


def parse_json(body: bytes, *, max_values: int, max_containers: int | None = None, hint: str) -> Any:
    """Parse JSON whose number of values is bounded.

    The parser holds the interpreter's lock until it is done, so what it may be given is counted first: each value but the
    first of a container follows a comma, and each container begins with a bracket. Brackets and commas in strings count too.

    Args:
        max_values: The most commas, lists and objects.
        max_containers: The most lists and objects; ``max_values`` if not given.
        hint: What to do, for the message.

    Raises:
        Problem: ``json_too_large``, or ``bad_json`` for what is no JSON in UTF-8 or has text that cannot be stored.
    """
    containers = body.count(b"[") + body.count(b"{")
    values = containers + body.count(b",")
    for count, limit, name in (
        (containers, max_values if max_containers is None else max_containers, "lists and objects"),
        (values, max_values, "values"),
    ):
        if count > limit:
            raise Problem("json_too_large", f"The JSON has {count:,} {name} and at most {limit:,} are allowed; {hint}.")
    try:
        # Decoded here, as json.loads() guesses UTF-16 and UTF-32 too, and lets unpaired surrogates through.
        document = json.loads(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise Problem("bad_json", f"The JSON cannot be read ({error}); {hint}.") from None
    if b"\\u" in body:  # only an escape can produce what is checked for
        check_text("The JSON", *strings_in(document), code="bad_json")
    return document
