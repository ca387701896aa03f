"""Names and addresses as Kubernetes wants them, and the words for those that are not so. Pure."""

from __future__ import annotations

import hashlib
import ipaddress
import re

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
# RFC 6335, section 5.1: what Kubernetes calls IANA_SVC_NAME.
_SERVICE_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*", re.ASCII)

MEND_LABEL = "write 1 to 63 lower-case letters, digits or '-', with a letter or digit at both ends"
MEND_SUBDOMAIN = f"write at most 253 characters of labels joined by '.'; in each, {MEND_LABEL}"
MEND_PORT_NAME = "write 1 to 15 lower-case letters, digits or single '-', with at least one letter"


def is_label(text: str) -> bool:
    """True for a DNS label of RFC 1123: at most 63 of a-z, 0-9 and '-'."""
    return _LABEL.fullmatch(text) is not None


def is_subdomain(text: str) -> bool:
    """True for labels of RFC 1123 joined by dots, 253 characters at most."""
    return len(text) <= 253 and all(map(is_label, text.split(".")))


def is_port_name(text: str) -> bool:
    """True for a name that a container's port may have."""
    return _SERVICE_NAME.fullmatch(text) is not None


def address_fault(text: str, family: str = "") -> tuple[str, str] | None:
    """What makes `text` no plain IP address of `family` ("IPv4", "IPv6", "" for either).

    Gives (what is wrong, what to write instead), or None if nothing is.
    """
    shown = show(text)
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        if re.fullmatch(r"\d+(\.\d+){3}", text, re.ASCII) and re.search(r"\b0\d", text):
            # Some programs read 010 as ten, others as octal eight: CVE-2021-29923.
            return f"{shown} has a number with a leading zero", "write it without leading zeros"
        return f"{shown} is not an IP address", "write one such as 10.0.0.7 or fd00::7"
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return f"{shown} has a zone", "write an address that is the same on every node"
        if address.ipv4_mapped is not None:
            return f"{shown} is an IPv4-mapped address", f"write {address.ipv4_mapped}"
    if family and family != f"IPv{address.version}":
        return f"{shown} is not an {family} address", f"write an {family} address"
    return None


def remote_address_fault(text: str, family: str = "") -> tuple[str, str] | None:
    """As `address_fault`, and also refuses addresses that can be no other host's."""
    if fault := address_fault(text, family):
        return fault
    address = ipaddress.ip_address(text)
    for name in ("unspecified", "loopback", "link_local", "multicast"):
        if getattr(address, f"is_{name}"):
            kind = name.replace("_", "-")
            return f"{text} is a {kind} address", "write an address that other hosts can reach"
    return None


def cidr_fault(text: str) -> tuple[str, str] | None:
    """What makes `text` no CIDR, as `address_fault` says it. Bits of the host may be set."""
    address, slash, length = text.partition("/")
    if not slash:
        return f"{show(text)} is not a CIDR", "write one such as 10.0.0.0/8 or fd00::/8"
    if fault := address_fault(address):
        return fault
    longest = ipaddress.ip_address(address).max_prefixlen
    if not re.fullmatch(r"\d{1,3}", length, re.ASCII) or int(length) > longest:
        return f"{show(length)} is no length of a prefix", f"write a number from 0 to {longest}"
    return None


def show(value: object) -> str:
    """A value as it stands in a message: quoted if it is text, and never longer than a line."""
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else f"{text[:76]}…"


def fitted(text: str, limit: int = 63) -> str:
    """`text` itself if it has at most `limit` bytes; else cut, with a hash of the whole at its end.

    For names in the maps, which have fixed room: the same text gives the same name after a restart.
    """
    data = text.encode()
    if len(data) <= limit:
        return text
    return f"{data[: limit - 9].decode(errors='ignore')}-{hashlib.sha256(data).hexdigest()[:8]}"
