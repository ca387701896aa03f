"""What `validate` is made of: findings, and the checks that kinds of objects share. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pointsman.names import (
    MEND_LABEL,
    MEND_PORT_NAME,
    MEND_SUBDOMAIN,
    is_label,
    is_port_name,
    is_subdomain,
    show,
)
from pointsman.objects import ObjectMeta

PROTOCOLS = ("TCP", "UDP", "SCTP")
FAMILIES = ("IPv4", "IPv6")

MEND_PORT = "write a number from 1 to 65535"


class Finding(NamedTuple):
    """One thing wrong with the field at this path of an object; `reason` as in `Problem`."""

    field: str
    message: str
    mend: str
    severity: str = "error"
    reason: str = ""


Findings = Iterator[Finding]


def check_one_of(field: str, value: str, known: Sequence[str]) -> Findings:
    if value not in known:
        names = f"{', '.join(known[:-1])} or {known[-1]}"
        yield Finding(field, f"{show(value)} is unknown", f"write {names}")


def check_label(field: str, value: str) -> Findings:
    if not is_label(value):
        yield Finding(field, f"{show(value)} is not a DNS label", MEND_LABEL)


def check_port(field: str, value: int) -> Findings:
    if not 1 <= value <= 65535:
        yield Finding(field, f"{value} is not a port", MEND_PORT)


def check_unique(field: str, key: object, text: str, seen: dict[object, str]) -> Findings:
    """`seen` maps each key met so far to the field that had it first."""
    first = seen.setdefault(key, field)
    if first != field:
        yield Finding(field, f"{text} is also that of {first}", "make them different")


def check_port_name(field: str, name: str) -> Findings:
    if name.isdecimal():
        yield Finding(field, f"{show(name)} is text", "write the number without quotes")
    elif not is_port_name(name):
        yield Finding(field, f"{show(name)} is not a port name", MEND_PORT_NAME)


def check_name(meta: ObjectMeta, *, is_dns_label: bool = False) -> Findings:
    """metadata.name: a DNS subdomain, or even a DNS label."""
    if not meta.name:
        yield Finding("metadata.name", "there is no name", "add metadata.name")
    elif is_dns_label:
        yield from check_label("metadata.name", meta.name)
    elif not is_subdomain(meta.name):
        message = f"{show(meta.name)} is not a DNS subdomain"
        yield Finding("metadata.name", message, MEND_SUBDOMAIN)


def check_namespace(meta: ObjectMeta) -> Findings:
    yield from check_label("metadata.namespace", meta.namespace)
