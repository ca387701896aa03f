"""Commands that change what is pinned: load, unload."""

from __future__ import annotations

from pathlib import Path

import click

from pointsman import host, portranges, state
from pointsman.cli import options, packets
from pointsman.drain import drain as drained
from pointsman.errors import PointsmanError
from pointsman.pins import Pins


@click.command()
@options.sizes
@packets.devices
@options.bpffs
@options.run_dir
def load(devices: tuple[str, ...], bpffs: Path, run_dir: Path, **sizes: int) -> None:
    """Compile and pin programs and maps, so that 'up' starts at once. Attaches nothing.

    \b
    Example:
        pointsman load && pointsman map list
    """
    host.require_root()
    lock = state.Lock(run_dir)
    try:
        host.mount_bpffs(bpffs)
        pins = Pins(bpffs, options.sizes_of(sizes))
        pins.prepare_root()
        lock.pins(bpffs)
        loaded = pins.load(packets=bool(devices))
    finally:
        lock.release()
    how = "loaded and pinned" if loaded.fresh else "already pinned"
    click.echo(f"generation {loaded.generation.name}: {how} under {bpffs}")
    if loaded.packets_error:
        click.echo(loaded.packets_error, err=True)
    if loaded.flows_kept:
        wanted, kept = loaded.flows_kept
        click.echo(f"flows keeps {kept} entries instead of {wanted}: devices are served", err=True)
    if loaded.flows_lost:
        told = "flows have another layout: 'pointsman up' ends connections of clients outside"
        click.echo(told, err=True)
    if loaded.previous:
        click.echo(f"generation {loaded.previous.name} still runs; 'pointsman up' flips to the new")


@click.command()
@click.option(
    "--drain",
    type=click.IntRange(min=0),
    default=0,
    metavar="SECONDS",
    help="Where another proxy serves the same: leave new connections to it, and wait for so long "
    "that those of clients outside end.  [default: 0, do not wait]",
)
@options.bpffs
@options.run_dir
def unload(drain: int, bpffs: Path, run_dir: Path) -> None:
    """Detach and unpin everything that is Pointsman's. Connections that are open stay open.

    Those of clients outside, whose packets it translates, do not: with --drain they may end first.
    The ports that 'up' had reserved are given back, those that were reserved before stay so.

    \b
    Examples:
        pointsman unload
        pointsman unload --drain 60      # back to kube-proxy: see 'pointsman takeover --back'
    """
    host.require_root()
    lock = state.Lock(run_dir)
    try:
        removed = []
        if bpffs.is_dir():
            lock.pins(bpffs)
            generation = Pins(bpffs).current
            if drain and generation and (left := drained(generation, drain)):
                click.echo(f"still open after {drain} s, and end: {left} flows of clients outside")
            removed = Pins(bpffs).unload()
        reserved, released = state.read_reserved(run_dir), False
        if reserved:
            try:
                released = host.release_ports(reserved)
            except OSError as error:
                raise PointsmanError(f"ports that are still reserved: {error}") from None
            if released:
                state.write_reserved(run_dir, ())
    finally:
        lock.release()
    for name in removed:
        click.echo(f"removed {bpffs / name}")
    if released:
        click.echo(f"ports are no longer reserved: {portranges.to_text(reserved)}")
    elif reserved:
        click.echo(
            f"ports {portranges.to_text(reserved)} are not reserved in this network namespace; "
            "run this in the host's to give them back there",
            err=True,
        )
    if not removed:
        click.echo(f"nothing is loaded under {bpffs}")
