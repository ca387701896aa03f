"""How the story is printed: chapters, commands as people type them, results, a table at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the final table."""

    what: str
    measured: str
    right: bool


class Teller:
    """Prints as it goes, and remembers what was found."""

    def __init__(self) -> None:
        console = Console(highlight=False)
        # Piped output is not cut to some terminal's width.
        width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
        self._console = Console(highlight=False, width=width)
        self._chapter = 0
        self.findings: list[Finding] = []

    @property
    def well(self) -> bool:
        return all(finding.right for finding in self.findings)

    def opening(self, title: str, text: str) -> None:
        self._console.print(Panel(text, title=title, box=box.ROUNDED, padding=(1, 2)))

    def chapter(self, title: str) -> None:
        self._chapter += 1
        self._console.print()
        self._console.rule(f"[bold]{self._chapter}. {title}", align="left", characters="─")

    def say(self, text: str) -> None:
        """Running text; may have rich's markup."""
        self._console.print()
        self._console.print(text)

    def command(self, where: str, line: str) -> None:
        """A command behind the prompt of the place it is typed at: "node" or "client"."""
        self._console.print()
        prompt = f"[bold green]{where}$[/] [bold]{escape(line)}[/]"
        self._console.print(f"  {prompt}", soft_wrap=True)

    def result(self, text: str, limit: int = 40) -> None:
        """What a command printed; no more than `limit` lines of it."""
        lines = text.rstrip().splitlines()
        if len(lines) > limit:
            left = len(lines) - limit
            lines = [*lines[:limit], f"… and {left} more lines"]
        for line in lines:
            self._console.print("  " + line, style="cyan", markup=False, soft_wrap=True)

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for n, column in enumerate(columns):
            numbers = all(row[n].replace(" ", "").isdigit() for row in rows)
            table.add_column(column, justify="right" if numbers and rows else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        self._console.print(Padding(table, (1, 0, 0, 2), expand=False))

    def shares(self, pods: Counter[str]) -> None:
        """Who answered how often, with bars."""
        most = max(pods.values(), default=1)
        rows = [
            [pod, str(n), "▇" * max(1, round(n * 30 / most))] for pod, n in sorted(pods.items())
        ]
        self.table(["answered by", "times", ""], rows)

    def found(self, what: str, measured: str, right: bool) -> None:
        """Something shown, with its figure: printed now and in the final table."""
        self.findings.append(Finding(what, measured, right))
        mark = "[bold green]✓[/]" if right else "[bold red]✗[/]"
        self._console.print(f"\n  {mark} {escape(what)}: [bold]{escape(measured)}[/]")

    def wrong(self, text: str) -> None:
        self._console.print(f"\n[bold red]{escape(text)}[/]")

    def end(self, seconds: float) -> None:
        table = Table(title="What was shown", box=box.ROUNDED, title_style="bold", show_lines=False)
        table.add_column("shown")
        table.add_column("measured")
        table.add_column("")
        for finding in self.findings:
            mark = "[green]ok[/]" if finding.right else "[bold red]FAILED[/]"
            table.add_row(escape(finding.what), escape(finding.measured), mark)
        self._console.print()
        self._console.print(table)
        ending = "All of it held." if self.well else "Something did not hold: see FAILED above."
        self._console.print(f"{ending} {seconds:.0f} seconds.")
