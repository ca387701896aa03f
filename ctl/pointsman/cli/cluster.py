"""The options of 'up' for a cluster: which API server, and where health and metrics are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from pointsman.cli.options import address
from pointsman.kube.access import Access

HEALTHZ_PORT, METRICS_PORT = 10256, 10249  # kube-proxy's


def _server(_context: click.Context, _param: click.Parameter, value: str) -> str:
    parts = urlsplit(value)
    if value and not (parts.scheme in ("http", "https") and parts.hostname):
        raise click.BadParameter(f"{value!r} is no URL; write e.g. https://192.0.2.1:6443")
    if "@" in parts.netloc:
        raise click.BadParameter("a URL with a password shows it to everybody; use --kubeconfig")
    return value.rstrip("/")


def _bind_address(
    _context: click.Context, param: click.Parameter, value: str | None
) -> tuple[str, int] | str | None:
    if value is None or value == "off":
        return value
    default = HEALTHZ_PORT if param.name == "healthz_bind_address" else METRICS_PORT
    return address(value, default)


OPTIONS = (
    click.option(
        "--kubernetes",
        is_flag=True,
        help="Follow an API server instead of --manifests: the one that --kubeconfig names, or "
        "that of the pod's service account.",
    ),
    click.option(
        "--kubeconfig",
        envvar="KUBECONFIG",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Kubeconfig file for --kubernetes.  [default: the pod's service account]",
    ),
    click.option("--context", "kube_context", default="", help="Context of the kubeconfig."),
    click.option(
        "--api-server",
        default="",
        metavar="URL",
        callback=_server,
        help="Address of the API server instead of the configured one. In a pod, without another "
        "proxy, it has to be one that is no ClusterIP: nobody translates that before 'up' does.",
    ),
    click.option(
        "--healthz-bind-address",
        metavar="ADDRESS[:PORT]|off",
        callback=_bind_address,
        help="Where /healthz, /livez and /readyz are answered.  "
        f"[default: 0.0.0.0:{HEALTHZ_PORT} with --kubernetes, else off]",
    ),
    click.option(
        "--metrics-bind-address",
        metavar="ADDRESS[:PORT]|off",
        callback=_bind_address,
        help="Where /metrics is answered.  "
        f"[default: 127.0.0.1:{METRICS_PORT} with --kubernetes, else off]",
    ),
)


def access(params: dict[str, Any]) -> Access | None:
    """None: the manifests are followed."""
    kubeconfig, context, server = (
        params.pop(name) for name in ("kubeconfig", "kube_context", "api_server")
    )
    if not params.pop("kubernetes"):
        source = click.get_current_context().get_parameter_source("kubeconfig")
        given = kubeconfig and source is not ParameterSource.ENVIRONMENT
        for name, value in (
            ("--kubeconfig", given), ("--context", context), ("--api-server", server)
        ):  # fmt: skip
            if value:
                raise click.UsageError(f"{name} is of use with --kubernetes only; add that")
        return None
    return Access(kubeconfig and kubeconfig.absolute(), context, server)


def bind_addresses(
    params: dict[str, Any], *, kubernetes: bool
) -> tuple[tuple[str, int] | None, tuple[str, int] | None]:
    """Of the health server and the metrics server; None for off."""
    found: list[tuple[str, int] | None] = []
    for name, default in (
        ("healthz_bind_address", ("0.0.0.0", HEALTHZ_PORT)),  # noqa: S104 - probed from outside
        ("metrics_bind_address", ("127.0.0.1", METRICS_PORT)),
    ):
        value = params.pop(name)
        if value is None:
            found.append(default if kubernetes else None)
        else:
            found.append(None if value == "off" else value)
    return found[0], found[1]
