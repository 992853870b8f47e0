"""Who may ask, and what a browser may do with an answer."""

from __future__ import annotations

import hmac

from flask import Request

from service.http.errors import Problem
from service.settings import Settings

KEY_COOKIE = "api_key"
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'; manifest-src 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}


def require_key(request: Request, settings: Settings) -> str | None:
    """The name of the key that came with a request, or None where no keys are set. Raises Problem for a wrong one.

    A key comes as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``.
    """
    return authenticate(key_from_request(request), settings)


def key_from_request(request: Request) -> str:
    """The key in a request's headers; empty where there is none."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("X-API-Key", "")


def require_key_or_cookie(request: Request, settings: Settings) -> str | None:
    """As ``require_key``, for pages: a browser that was given the key keeps it in a cookie."""
    if "Authorization" in request.headers or "X-API-Key" in request.headers:
        return require_key(request, settings)
    return authenticate(request.cookies.get(KEY_COOKIE, ""), settings)


def require_same_origin(request: Request) -> None:
    """Raise Problem for what another site made a browser send.

    Every browser says where a request comes from, ``Sec-Fetch-Site`` or at least ``Origin``, and no page can forge them; what
    comes with neither is no browser, and has no cookies to be misused (as in Go's CrossOriginProtection).
    """
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site in ("same-origin", "none") or (site is None and origin in (None, request.host_url.rstrip("/"))):
        return
    raise Problem("cross_site_request", f"The request came from {origin or 'another site'}; decide on the gallery's own pages.")


def authenticate(given: str, settings: Settings) -> str | None:
    """What API_KEYS call a key, or None where no keys are set. Raises Problem for one that is not known."""
    return match_key(settings.api_keys, given)


def match_key(rows: tuple[str, ...], given: str) -> str | None:
    """What the ``rows``, NAME:KEY or KEY, call a key: all are compared, each in constant time. Raises Problem for another."""
    if not rows:
        return None
    found = None
    for row in rows:
        name, _, key = row.rpartition(":")
        if hmac.compare_digest(key.encode(), given.encode()):
            found = name or "key"
    if found is None:
        what = "The key is not one that is known here" if given else "No key came with the request"
        raise Problem(
            "unauthorized",
            f"{what}; send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return found


def cors_headers(origin: str | None, allowed: tuple[str, ...]) -> dict[str, str]:
    """What tells a browser whether a page of ``origin`` may read the answer; nothing where no origins are ``allowed``."""
    if not origin or not allowed:
        return {}
    if "*" not in allowed and origin not in allowed:
        return {"Vary": "Origin"}
    return {
        "Access-Control-Allow-Origin": "*" if "*" in allowed else origin,
        "Access-Control-Allow-Headers": "Authorization, Content-Type, X-API-Key, X-Request-ID",
        "Access-Control-Allow-Methods": "POST, OPTIONS",
        "Access-Control-Expose-Headers": "Retry-After, X-Request-ID, X-Model-Version",
        "Cross-Origin-Resource-Policy": "cross-origin",
        "Vary": "Origin",
    }
