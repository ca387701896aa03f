"""What `pointsman` answers a shell whose user has pressed TAB."""

from __future__ import annotations

import os
import subprocess
import sys

_PROGRAM = """import sys
sys.argv[0] = 'pointsman'
from pointsman.cli.main import main
main()"""


def completions(shell: str, words: str, **environment: str) -> list[str]:
    """By the protocol of the scripts that click makes; the last of `words` is not complete."""
    split = words.split(" ")
    # fish tells the last word, and all; the others which of them it is.
    current = split[-1] if shell == "fish" else str(len(split) - 1)
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={
            **os.environ,
            **environment,
            "_POINTSMAN_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": current,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    if shell == "zsh":  # type, word, help
        return lines[1::3]
    return [line.partition(",")[2].partition("\t")[0] for line in lines if line]
