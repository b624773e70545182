"""What a request must bring before the studio looks at it: a known host, the studio's own page, a token, a small body.

A page of another site that is open in the same browser can send requests to 127.0.0.1 (cross-site requests), and a name
that it controls can point there (DNS rebinding). The first fails by its Origin, the second by its Host.
"""

import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from digit.runtime.files import format_bytes

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "digit_studio"
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?", re.ASCII)
LOCAL = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class TooLargeError(Exception):
    """A body is longer than what its address takes; raised while the application reads it."""


class Guard:
    """Refuses requests in front of `app`, and adds the headers that keep a browser from doing more than the page needs.

    Args:
        app: what answers the others.
        hosts: names under which the studio may be called, without port; of this machine always LOCAL.
        token: what a request must bring as a cookie, as `Authorization: Bearer`, or once as ?token=; None for none.
        limits: bytes of a body by path; "" is every other path.
    """

    def __init__(self, app: App, *, hosts: set[str], token: str | None, limits: dict[str, int]) -> None:
        self.app, self.hosts, self.token, self.limits = app, {*LOCAL, *hosts}, token, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self.refusal(scope, headers):
            await answer(send, *refusal)
            return
        if self.token is not None and not self.known(headers):
            await self.enter(scope, send)
            return
        limit = self.limits.get(scope["path"], self.limits[""])
        taken = 0

        async def receive_limited() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise TooLargeError(too_large(limit))
            return message

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *encoded(HEADERS)]
            await send(message)

        await self.app(scope, receive_limited, send_with_headers)

    def refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason, or None for a request that may go on."""
        names = [name for name, _ in scope["headers"] if name.lower() == b"host"]
        if len(names) != 1 or host_of(headers.get("host", "")) not in self.hosts:
            return 421, "the studio is not called by this name: open the address that it printed, or add --allow_host"
        origin = headers.get("origin")
        if origin is not None and not self.same_origin(origin, headers["host"]):
            return 403, "the request comes from a page of another site: open the studio's own page"
        works = scope["method"] != "GET" or scope["path"].startswith(
            "/api/"
        )  # a link may lead to the page, not to its work
        if origin is None and headers.get("sec-fetch-site") in ("cross-site", "same-site") and works:
            return 403, "the request comes from a page of another site: open the studio's own page"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, f"{scope['method']} is no method of the studio: GET and POST are"
        limit = self.limits.get(scope["path"], self.limits[""])
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18:
            return 400, "Content-Length is no number: leave it to the browser"
        if int(length) > limit:
            return 413, too_large(limit)
        return None

    @staticmethod
    def same_origin(origin: str, host: str) -> bool:
        try:
            parts = urlsplit(origin)
            return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()
        except ValueError:
            return False

    def known(self, headers: dict[str, str]) -> bool:
        """Whether a request brings the token."""
        assert self.token is not None
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        given = [headers.get("authorization", "").removeprefix("Bearer ")] + ([cookie.value] if cookie else [])
        return any(hmac.compare_digest(value.encode(), self.token.encode()) for value in given)

    async def enter(self, scope: Scope, send: Send) -> None:
        """Turn ?token= into a cookie, or refuse."""
        assert self.token is not None
        given = parse_qs(scope.get("query_string", b"").decode("latin-1"), max_num_fields=8).get("token", [""])[0]
        if scope["method"] == "GET" and hmac.compare_digest(given.encode(), self.token.encode()):
            cookie = f"{COOKIE}={self.token}; Path=/; HttpOnly; SameSite=Strict; Max-Age=604800"
            await answer(send, 303, "", {"location": "/", "set-cookie": cookie})
            return
        await answer(send, 401, "a token is needed: open the whole address that the studio printed, with ?token=")


def too_large(limit: int) -> str:
    """What is wrong with a body of more than `limit` bytes."""
    return f"the request is larger than {format_bytes(limit)}: send a smaller picture"


def host_of(value: str) -> str:
    """The name in a Host header, in lower case, without port; empty for what is none."""
    match = HOST.fullmatch(value)
    return match[1].strip("[]").lower() if match else ""


def encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def answer(send: Send, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    """Send a short JSON answer."""
    body = json.dumps({"error": text}).encode()
    head = encoded({"content-type": "application/json", "cache-control": "no-store"} | HEADERS | (headers or {}))
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
