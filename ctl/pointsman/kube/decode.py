"""What an API server sends, as typed objects: bytes in, values out. Pure.

Each object of a page is decoded by itself: a bad one is named and takes none of the others with it,
and what one does not need is free for the next, which for 10,000 EndpointSlices of 10 endpoints
takes no longer than the whole page at once and 48 MB less. Where the typed decoder fails, it is
tried again without the nulls that other writers than today's API server leave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from msgspec.structs import force_setattr

from pointsman.documents import clean, explain
from pointsman.events import Problem
from pointsman.kube.admit import admit
from pointsman.kube.api import ApiError
from pointsman.objects import KINDS, EndpointSlice, Object, Ref

_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_MANY = 20_000  # texts kept for sharing, at most
# Of what is no JSON. msgspec lets the latter two through: bytes that are no UTF-8, and nesting
# without an end.
_NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Item(NamedTuple):
    """An object as listed or watched. `object` is None if it is bad, or deleted."""

    ref: Ref
    version: str
    object: Object | None
    problems: tuple[Problem, ...] = ()


class Page(NamedTuple):
    """A part of a list. `more` is the token to continue with, "" at the end. `whole` is False if
    there was an object in it that does not even say its name."""

    items: list[Item]
    version: str
    more: str
    whole: bool = True


class Noted(NamedTuple):
    """A watch event. `type` is ADDED, MODIFIED, DELETED or BOOKMARK; `item` is None for the last,
    and for an object that does not say its name."""

    type: str
    version: str
    item: Item | None = None


class _ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str | None = msgspec.field(default="", name="continue")


class _List(msgspec.Struct):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Meta(msgspec.Struct, rename="camel"):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class _Named(msgspec.Struct):
    metadata: _Meta


class _Details(msgspec.Struct, rename="camel"):
    retry_after_seconds: int = 0


class _Status(msgspec.Struct):
    """metav1.Status: what went wrong."""

    code: int = 0
    reason: str = ""
    message: str = ""
    details: _Details | None = None


_EVENT, _NAMED = msgspec.json.Decoder(_Event), msgspec.json.Decoder(_Named)
_STATUS, _LIST = msgspec.json.Decoder(_Status), msgspec.json.Decoder(_List)


def error_of(status: int, body: bytes, retry_after: float = 0.0) -> ApiError:
    """The error that a metav1.Status says; or any other text that a proxy may have put there."""
    try:
        said = _STATUS.decode(body)
    except _NO_JSON:
        text = body[:200].decode(errors="replace").strip()
        return ApiError(status, "", text or "no reason given", retry_after)
    seconds = said.details.retry_after_seconds if said.details else 0
    return ApiError(
        status or said.code, said.reason, said.message or said.reason, retry_after or seconds
    )


class Decoder:
    """Of the objects of one kind; belongs to one thread.

    What nobody reads is taken out: resourceVersion, so that an update of nothing that matters
    gives an equal object, and kubectl's copy of the manifest. Texts that repeat are shared.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._type = KINDS[kind]
        self._objects: msgspec.json.Decoder[Object] = msgspec.json.Decoder(self._type)
        self._texts: dict[Any, Any] = {}

    def page(self, data: bytes) -> Page:
        """A page of a list. Raises ApiError (status 0) if it is none."""
        try:
            found = _LIST.decode(data)
            items = [self._from(raw) for raw in found.items or ()]
        except _NO_JSON as error:
            raise _garbled(error) from None
        named = [item for item in items if item]
        meta = found.metadata
        whole = len(named) == len(items)
        return Page(named, meta.resource_version, meta.continue_ or "", whole)

    def line(self, line: bytes) -> Noted:
        """A line of a watch. Raises ApiError: what an ERROR event says, or with status 0 if the
        line is none."""
        try:
            event = _EVENT.decode(line)
            if event.type == "ERROR":
                raise error_of(0, bytes(event.object))
            if event.type == "BOOKMARK":
                return Noted("BOOKMARK", _NAMED.decode(event.object).metadata.resource_version)
            if event.type == "DELETED":
                meta = _NAMED.decode(event.object).metadata
                ref = Ref(self._kind, meta.namespace, meta.name)
                return Noted("DELETED", meta.resource_version, Item(ref, "", None))
            if event.type not in ("ADDED", "MODIFIED"):
                return Noted(event.type, "")
            item = self._from(event.object)
        except _NO_JSON as error:
            raise _garbled(error) from None
        return Noted(event.type, item.version if item else "", item)

    def _from(self, raw: msgspec.Raw) -> Item | None:
        """An object by itself; None if it does not say its name."""
        try:
            return self._item(self._objects.decode(raw))
        except msgspec.ValidationError:
            pass
        value = clean(msgspec.json.decode(raw), {})
        try:
            return self._item(msgspec.convert(value, self._type))
        except msgspec.ValidationError as error:
            field, message, mend = explain(error, value)
        try:
            meta = msgspec.convert(value, _Named).metadata
        except msgspec.ValidationError:
            return None
        ref = Ref(self._kind, meta.namespace, meta.name)
        return Item(
            ref, meta.resource_version, None, (Problem(message, mend, "", str(ref), field),)
        )

    def _item(self, obj: Object) -> Item:
        ref, version = obj.ref, obj.metadata.resource_version
        self._compact(obj)
        entering, problems = admit(obj)
        return Item(ref, version, entering, problems)

    def _compact(self, obj: Object) -> None:
        meta, share = obj.metadata, self._texts.setdefault
        if len(self._texts) > _MANY:
            self._texts.clear()
        force_setattr(meta, "resource_version", "")
        force_setattr(meta, "namespace", share(meta.namespace, meta.namespace))
        meta.annotations.pop(_LAST_APPLIED, None)
        if isinstance(obj, EndpointSlice):
            for endpoint in obj.endpoints or ():
                for name in ("node_name", "zone", "hints", "conditions"):
                    value = getattr(endpoint, name)
                    force_setattr(endpoint, name, share(value, value))
                if target := endpoint.target_ref:
                    for name in ("kind", "namespace"):
                        value = getattr(target, name)
                        force_setattr(target, name, share(value, value))
            ports = obj.ports
            force_setattr(obj, "ports", share(ports, ports))


def _garbled(error: Exception) -> ApiError:
    return ApiError(0, "Garbled", f"what came is not what an API server sends: {error}")
