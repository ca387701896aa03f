"""The languages of this machine, and a small client in each: `clients/` has their sources.

Every client takes HOST PORT PATH COUNT, makes COUNT connections one after the other, and prints a
line for each: the pod that answered (its X-Pod header), the peer's address as the language sees
it ("-" where it does not tell), and the body. None of them knows of Pointsman.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "clients"


@dataclass(frozen=True, slots=True)
class Language:
    """`{source}` and `{binary}` stand for paths, `{tool}` for the program that was found."""

    name: str
    tools: tuple[str, ...]
    version: tuple[str, ...]
    source: str
    run: tuple[str, ...]
    build: tuple[str, ...] = ()
    slow: bool = False  # to build or to start, so `--fast` leaves it out


LANGUAGES = (
    Language("curl", ("curl",), ("--version",), "curl.sh", ("sh", "{source}")),
    Language("Python", ("python3",), ("--version",), "client.py", ("{tool}", "{source}")),
    Language("Node", ("node",), ("--version",), "client.mjs", ("{tool}", "{source}")),
    Language("Java", ("java",), ("-version",), "Client.java", ("{tool}", "{source}"), slow=True),
    Language(
        "Go",
        ("go",),
        ("version",),
        "client.go",
        ("{binary}",),
        ("{tool}", "build", "-o", "{binary}", "{source}"),
        slow=True,
    ),
    Language(
        "Rust",
        ("rustc",),
        ("--version",),
        "client.rs",
        ("{binary}",),
        ("{tool}", "--edition", "2021", "-o", "{binary}", "{source}"),
    ),
    Language(
        "C",
        ("gcc", "clang", "cc"),
        ("--version",),
        "client.c",
        ("{binary}",),
        ("{tool}", "-std=gnu11", "-O", "-o", "{binary}", "{source}"),
    ),
    Language("Perl", ("perl",), ("-e", "print $^V"), "client.pl", ("{tool}", "{source}")),
    Language("Ruby", ("ruby",), ("--version",), "client.rb", ("{tool}", "{source}")),
    Language("PHP", ("php",), ("--version",), "client.php", ("{tool}", "{source}")),
    Language("Bash", ("bash",), ("--version",), "client.bash", ("{tool}", "{source}")),
)

# Where toolchains live that are not on root's PATH.
_ELSEWHERE = ("/usr/local/go/bin", "~/.cargo/bin", "/usr/local/cargo/bin")
# Go and curl alike go by these; the demo's namespaces have no way to a proxy.
_NOT_FOR_CLIENTS = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "java_tool_options")


@dataclass(frozen=True, slots=True)
class Client:
    """A client that can be run, or, with `problem`, why it can't."""

    language: Language
    version: str
    command: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """What one run of a client printed, judged."""

    asked: int
    pods: Counter[str]
    peers: frozenset[str]
    problem: str = ""

    @property
    def good(self) -> int:
        return self.pods.total()


def environment() -> dict[str, str]:
    """This process's environment without what would send a client to a proxy."""
    return {name: v for name, v in os.environ.items() if name.lower() not in _NOT_FOR_CLIENTS}


def _search_path() -> str:
    more = [str(Path(path).expanduser()) for path in _ELSEWHERE]
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *more])


def _find(language: Language) -> str | None:
    if language.name == "Python" and Path("/usr/bin/python3").exists():
        return "/usr/bin/python3"  # a program of the machine, not of the venv that runs this
    for tool in language.tools:
        if found := shutil.which(tool, path=_search_path()):
            return found
    return None


def _prepare(language: Language, tool: str, directory: Path, calls: _Calls) -> Client:
    """Asks the version and builds. A tool that only pretends to be there is a problem, named."""
    env = environment() | {
        "PATH": _search_path(),
        "CGO_ENABLED": "0",
        "GO111MODULE": "off",
        "GOTOOLCHAIN": "local",
        "GOFLAGS": "",
    }
    places = {
        "tool": tool,
        "source": str(SOURCES / language.source),
        "binary": str(directory / f"client-{language.name.lower()}"),
    }

    def call(arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return calls.run([part.format(**places) for part in arguments], env, directory)

    command = tuple(part.format(**places) for part in language.run)
    try:
        asked = call(("{tool}", *language.version))
        told = (asked.stdout or asked.stderr).strip().splitlines()
        version = _number(told[0]) if told else "?"
        built = call(language.build) if language.build and not asked.returncode else asked
    except OSError as error:
        return Client(language, "?", command, str(error))
    problem = _complaint(built.stderr or built.stdout) if built.returncode else ""
    return Client(language, version, command, problem)


def _complaint(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = text.strip().splitlines() or ["no reason given"]
    return next((line for line in lines if "error" in line.lower()), lines[-1])


def _number(line: str) -> str:
    """The first word of a line that has a dotted number in it: "go version go1.22" → "1.22"."""
    for word in line.split():
        number = word.strip('v,()"').removeprefix("go")
        if number[:1].isdigit() and "." in number:
            return number.split("(")[0].split("-")[0]
    return line


class _Calls:
    """Compilers at work, from several threads; `stop` ends those that still run."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(
        self, command: list[str], env: dict[str, str], directory: Path
    ) -> subprocess.CompletedProcess[str]:
        with self._lock:
            if self._stopped:
                raise OSError("the demo is ending")
            process = subprocess.Popen(
                command,
                env=env,
                cwd=directory,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            self._running.add(process)
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        with self._lock:
            self._running.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


@dataclass(frozen=True, slots=True)
class Workshop:
    """Clients in the making. `missing` are the languages that this machine does not have."""

    pending: tuple[tuple[Language, Future[Client]], ...]
    missing: tuple[Language, ...]
    left_out: tuple[Language, ...]

    def unfinished(self) -> list[Language]:
        return [language for language, client in self.pending if not client.done()]

    def clients(self) -> Iterator[Client]:
        """Each client as soon as it is its turn; waits for those that are still being built."""
        for _, client in self.pending:
            yield client.result()


@contextmanager
def workshop(directory: Path, *, fast: bool = False) -> Iterator[Workshop]:
    """Builds what must be built, in the background and side by side."""
    found = {language: _find(language) for language in LANGUAGES}
    wanted = {lang: tool for lang, tool in found.items() if tool and not (fast and lang.slow)}
    # Those that take longest begin first; the order in which they are shown stays.
    order = sorted(wanted, key=lambda lang: (not lang.slow, not lang.build))
    calls = _Calls()
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
        futures = {
            lang: pool.submit(_prepare, lang, wanted[lang], directory, calls) for lang in order
        }
        try:
            yield Workshop(
                pending=tuple((lang, futures[lang]) for lang in wanted),
                missing=tuple(lang for lang, tool in found.items() if not tool),
                left_out=tuple(lang for lang, tool in found.items() if tool and fast and lang.slow),
            )
        finally:
            calls.stop()
            pool.shutdown(cancel_futures=True)


def judge(printed: str, errors: str, asked: int, body: str) -> Answers:
    """Counts the answers whose body is exactly `body`."""
    pods: Counter[str] = Counter()
    peers = set()
    problem = ""
    for line in printed.splitlines():
        pod, peer, text = [*line.split(" ", 2), "", ""][:3]
        if text == body:
            pods[pod] += 1
            peers.add(peer)
        else:
            problem = problem or f"not the answer: {line}"
    if pods.total() < asked and not problem:
        problem = (errors.strip().splitlines() or ["it printed too few answers"])[-1]
    return Answers(asked, pods, frozenset(peers - {"-"}), problem)
