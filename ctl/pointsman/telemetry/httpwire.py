"""Requests and responses of HTTP/1.1 (RFC 9112) as octets: GET and HEAD, one a connection. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

LONGEST = 8192  # octets of a request's head


class Address(NamedTuple):
    """Where to listen. `host` is an IP address; with `dual`, "::" takes IPv4 as well."""

    host: str
    port: int
    dual: bool = False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Request(NamedTuple):
    """`headers` by name in lower case; `query` has all values of a name, "" where it has none."""

    method: str
    path: str
    query: Mapping[str, tuple[str, ...]]
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Response:
    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class BadRequest(ValueError):
    """Carries the status code of the answer."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def text(status: int, body: str) -> Response:
    return Response(status, body.encode(), _typed("text/plain; charset=utf-8"))


def json(status: int, body: str) -> Response:
    return Response(status, body.encode(), _typed("application/json"))


def _typed(kind: str) -> dict[str, str]:
    return {"Content-Type": kind, "X-Content-Type-Options": "nosniff"}


def read(octets: bytes) -> Request | None:
    """None while the head is not complete. Raises BadRequest."""
    head, end, _ = octets.partition(b"\r\n\r\n")
    if len(head) > LONGEST:
        raise BadRequest(431)
    if not end:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    try:
        method, target, version = first.split(" ")
        url = urlsplit(target)
        query: dict[str, tuple[str, ...]] = {}
        for name, value in parse_qsl(url.query, keep_blank_values=True):
            query[name] = (*query.get(name, ()), value)
    except ValueError:
        raise BadRequest(400) from None
    if not version.startswith("HTTP/1."):
        raise BadRequest(505 if version.startswith("HTTP/") else 400)
    if method not in ("GET", "HEAD"):
        raise BadRequest(405)
    fields = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    return Request(method, url.path, query, headers)


def render(response: Response, *, head: bool = False) -> bytes:
    """`head`: without the body, as a HEAD asks for it."""
    status = HTTPStatus(response.status)
    headers = {
        "Date": formatdate(usegmt=True),
        **response.headers,
        "Content-Length": str(len(response.body)),
        "Connection": "close",
    }
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = "GET, HEAD"
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (b"" if head else response.body)


def refuse(status: int) -> bytes:
    return render(text(status, HTTPStatus(status).phrase + "\n"))
