"""`pointsman`: the commands, their common options, and how errors become exit codes."""

from __future__ import annotations

import sys
import traceback

import click

from pointsman import __version__
from pointsman.cli.configure import config
from pointsman.cli.describe import describe
from pointsman.cli.health import status, verify
from pointsman.cli.look import explain, get
from pointsman.cli.maps import map_group
from pointsman.cli.run import load, unload
from pointsman.cli.takeover import takeover
from pointsman.cli.top import top
from pointsman.cli.trace import trace
from pointsman.cli.up import up
from pointsman.dnslisten import DnsListenError
from pointsman.errors import PointsmanError


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "POINTSMAN",
        "max_content_width": 100,
    }
)
@click.version_option(__version__, prog_name="pointsman")
def cli() -> None:
    """A Service load balancer: at the socket for this node's programs, by XDP and TC for clients
    outside. Sets the points before the train arrives.

    \b
    Start with a directory of ordinary Kubernetes manifests:
        pointsman up --manifests ./manifests
        pointsman get services
        pointsman explain 10.96.0.10:53/udp

    \b
    Exit codes: 0 done, 1 not healthy or different, 2 wrong usage, 3 not root, 4 no cgroup2,
    5 no bpffs, 6 kernel too old, 7 no compiler (bcc), 8 foreign map layout, 9 already running,
    11 nothing loaded, 12 not found, 13 no cluster, 10 anything else.
    """


_COMMANDS = (
    up, load, unload, status, get, top, describe, explain, trace, verify, takeover, map_group,
    config,
)  # fmt: skip
for command in _COMMANDS:
    cli.add_command(command)


def main() -> None:
    """The console script. Expected errors are one sentence on standard error."""
    try:
        sys.exit(cli(standalone_mode=False) or 0)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PointsmanError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        # What the system refused and no code above says better: a DNS port that is taken, say.
        text = error.strerror if isinstance(error, DnsListenError) else error
        click.echo(f"Error: {text}", err=True)
        sys.exit(PointsmanError.exit_code)
    except Exception as error:
        traceback.print_exc()
        click.echo(f"Error: {error!r}; this is a mistake in Pointsman: please report it", err=True)
        sys.exit(PointsmanError.exit_code)


if __name__ == "__main__":
    main()
