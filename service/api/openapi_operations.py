"""What an operation of the OpenAPI document is made of."""

from __future__ import annotations

from typing import Any

from service.api.openapi_schemas import STRING, problem_answers, ref


def get(operation: str, tag: str, summary: str, good: dict[str, Any], *codes: str) -> dict[str, Any]:
    """A GET with its answer and the problems of ``codes``."""
    responses = {"200": good, **problem_answers(*codes)}
    return {"operationId": operation, "tags": [tag], "summary": summary, "responses": responses}


def said(operation: dict[str, Any]) -> dict[str, Any]:
    """The same operation where its problems are said on a page."""
    for status, given in operation["responses"].items():
        if int(status) >= 400:
            given["content"] = {"text/html": {"schema": STRING}}
    return operation


def answer(description: str, media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {"X-Request-ID": ref("X-Request-ID", "headers")},
        "content": {media_type: {"schema": schema}},
    }


def parameter(name: str, schema: dict[str, Any], description: str, *, place: str = "query") -> dict[str, Any]:
    """A parameter; what is in a path is required, what is in a query is not."""
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}
