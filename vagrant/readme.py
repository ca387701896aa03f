#!/usr/bin/python3
"""Runs the commands that README.md shows on a node, in the VM, and compares what they print.

Word for word: only a line with … stands for any lines, and a pid for any pid. Exit code 1, with
both texts, where one differs. `unload` comes last: Pointsman is stopped for it, and started again.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def shown(text: str) -> Iterator[tuple[str, str]]:
    """Each `# pointsman …` of the README's blocks, and what it says comes out."""
    for block in re.findall(r"^```\n(# pointsman .*?)^```$", text, re.M | re.S):
        for part in re.split(r"^# (?=pointsman )", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            yield command, output.rstrip("\n")


def pattern(output: str) -> str:
    """A regular expression for all of what a command prints."""
    lines = (
        r"(?:.*\n)*?" if line == "…" else re.sub(r"pid\\ \d+", r"pid \\d+", re.escape(line)) + r"\n"
        for line in output.splitlines()
    )
    return "".join(lines) + r"\s*"


def main() -> int:
    wrong = 0
    for command, output in shown(README.read_text()):
        unload = command.endswith(" unload")
        if unload:
            subprocess.run(["systemctl", "stop", "pointsman"], check=True)
        # Warnings of this very kernel go to stderr.
        done = subprocess.run(command.split(), stdout=subprocess.PIPE, text=True, check=False)
        if unload:
            subprocess.run(["systemctl", "start", "pointsman"], check=True)
        same = re.fullmatch(pattern(output), done.stdout)
        print(f"{'as in the README' if same else 'NOT AS IN THE README'}: {command}")
        if not same:
            wrong += 1
            print(f"--- the README says\n{output}\n--- it printed (exit code {done.returncode})")
            print(done.stdout)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
