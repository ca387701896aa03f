"""Reading a configuration file, or the one in a directory where a ConfigMap is mounted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pointsman.config.configuration import BadConfiguration
from pointsman.config.files import choose
from pointsman.events import Problem

#: A ConfigMap may be as large.
MAX_BYTES = 1 << 20


def load(path: Path) -> tuple[Path, bytes]:
    """The file that `path` is or, of a directory, has, and its bytes. Raises BadConfiguration."""
    file = path
    try:
        if path.is_dir():
            try:
                file = path / choose([each.name for each in path.iterdir() if each.is_file()])
            except BadConfiguration as bad:
                raise BadConfiguration(
                    *(replace(each, where=str(path)) for each in bad.problems)
                ) from None
        elif path.exists() and not path.is_file():
            raise _fault(file, "it is no regular file", "write a file there")
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        mend = "write it, or name another with --config"
        raise _fault(file, "there is no configuration file", mend) from None
    except OSError as error:
        mend = "make it readable for this user"
        raise _fault(file, f"cannot be read: {error.strerror}", mend) from None
    if len(data) > MAX_BYTES:
        raise _fault(file, f"it has more than {MAX_BYTES} bytes", "name a configuration file")
    return file, data


def _fault(file: Path, message: str, mend: str) -> BadConfiguration:
    return BadConfiguration(Problem(message, mend, str(file)))
