"""Authentication, and what protects browsers: allowed hosts, same-origin requests, CORS and response headers."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence

from flask import Request

from service.http import PROBE_PATHS
from service.http.errors import Problem
from service.settings import Settings

KEY_COOKIE = "api_key"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
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


def require_allowed_host(request: Request, settings: Settings) -> None:
    """Raise Problem for a request to another host name than ALLOWED_HOSTS, in which a leading dot includes subdomains.

    A web page can let its own name resolve to the server's address (DNS rebinding). To a browser both are then one origin, so
    that the page reads and writes what only the server's users may. Probes address a server by its IP address, and may.
    """
    allowed: Sequence[str] = settings.allowed_hosts
    is_loopback = settings.host in ("localhost", "::1") or settings.host.startswith("127.")
    if not allowed and is_loopback and not settings.trusted_proxies:
        allowed = LOOPBACK if settings.host in ("::1", *LOOPBACK) else (settings.host, *LOOPBACK)
    if not allowed or PROBE_PATHS.fullmatch(request.path):
        return
    name = re.sub(r":\d*$", "", request.host.lower())
    if any(name == host or (host.startswith(".") and f".{name}".endswith(host)) for host in map(str.lower, allowed)):
        return
    raise Problem("bad_request", f'Unknown host "{request.host[:80]}". Use {" or ".join(allowed)}, or add it to ALLOWED_HOSTS.')


def require_key(request: Request, settings: Settings) -> str | None:
    """Authenticate a request by its headers ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``.

    Returns:
        The name of the key, or None if no keys are configured.

    Raises:
        Problem: The key is missing or unknown.
    """
    return authenticate(key_from_request(request), settings)


def key_from_request(request: Request) -> str:
    """Return the key in a request's headers, or an empty string."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("X-API-Key", "")


def require_key_or_cookie(request: Request, settings: Settings) -> str | None:
    """Authenticate a request to a page: by its headers, or by the cookie of a browser in which a key was entered.

    A key of ADMIN_KEYS is accepted as well.
    """
    return match_key(settings.api_keys and (*settings.api_keys, *settings.admin_keys), key_from_headers_or_cookie(request))


def require_studio_key(request: Request, settings: Settings) -> str | None:
    """Authenticate a change in the studio by a key of API_KEYS or ADMIN_KEYS, in a header or in the browser's cookie.

    Returns:
        The name of the key, or None if no keys are configured.

    Raises:
        Problem: The key is missing or unknown.
    """
    return match_key((*settings.api_keys, *settings.admin_keys), key_from_headers_or_cookie(request))


def require_admin_key_or_cookie(request: Request, settings: Settings) -> str | None:
    """Authenticate what the studio does to the active model: by a key of ADMIN_KEYS, or of API_KEYS if there are no others.

    Returns and raises as ``require_studio_key``.
    """
    return match_key(settings.admin_keys or settings.api_keys, key_from_headers_or_cookie(request))


def key_from_headers_or_cookie(request: Request) -> str:
    """Return the key in a request's headers, else the one in the cookie of a browser in which a key was entered."""
    if "Authorization" in request.headers or "X-API-Key" in request.headers:
        return key_from_request(request)
    return request.cookies.get(KEY_COOKIE, "")


def require_same_origin(request: Request) -> None:
    """Raise Problem for a request that another site made a browser send.

    Every browser sends ``Sec-Fetch-Site`` or at least ``Origin``, and pages cannot forge them. A request with neither is not
    from a browser and has no cookies to abuse (as in Go's `CrossOriginProtection <https://pkg.go.dev/net/http>`_).
    """
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site in ("same-origin", "none") or (site is None and origin in (None, request.host_url.rstrip("/"))):
        return
    raise Problem(
        "cross_site_request",
        f"The request came from {origin or 'another site'}. Use the gallery pages or a non-browser client.",
    )


def authenticate(key: str, settings: Settings) -> str | None:
    """Return the name of a key of API_KEYS, or None if no keys are configured. Raises Problem for an unknown key."""
    return match_key(settings.api_keys, key)


def match_key(rows: tuple[str, ...], key: str) -> str | None:
    """Find a key among configured ones, each compared in constant time.

    Args:
        rows: NAME:KEY or KEY.
        key: What the client sent.

    Returns:
        The name of the key, "key" for one without a name, or None if ``rows`` is empty.

    Raises:
        Problem: The key is missing or unknown.
    """
    if not rows:
        return None
    match = None
    for row in rows:
        name, _, known = row.rpartition(":")
        if hmac.compare_digest(known.encode(), key.encode()):
            match = name or "key"
    if match is None:
        what = "Unknown API key" if key else "An API key is required"
        raise Problem(
            "unauthorized",
            f"{what}. Send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`.",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return match


def cors_headers(origin: str | None, allowed: tuple[str, ...]) -> dict[str, str]:
    """Return the headers by which a browser lets a page of ``origin`` read the response; none if no origins are allowed."""
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
