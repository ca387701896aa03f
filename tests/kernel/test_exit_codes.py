"""What ends a command is one sentence on standard error and an exit code of its own."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pointsman import abi, bpf
from pointsman.hooks import HOOKS
from pointsman.pins import Generation, Pins
from pointsman.socketlinks import SocketLinks
from tests.kernel.reach import everyone
from tests.support.agents import STARTS, AgentProcess, endpoints, service
from tests.support.kernel import TCP, Cgroup, Lab, of_this_kernel, until

pytestmark = pytest.mark.kernel

VIP = "10.96.5.1"
NOBODY = 65534
Done = subprocess.CompletedProcess[str]


def sentence(done: Done, code: int, *words: str) -> str:
    """Standard error: one sentence with these words in it, lines of detail indented below it."""
    text = done.stderr
    assert done.returncode == code, f"exit code {done.returncode}, not {code}: {text}"
    assert "Traceback" not in text
    first, *more = text.rstrip("\n").split("\n")
    assert first.startswith("Error: "), text
    assert all(line.startswith("  ") for line in more), text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    return first


def sentence_after_log(done: Done, code: int, *words: str) -> str:
    """As `sentence`, for `up`, which logs to standard error before it ends."""
    lines = done.stderr.split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith("Error: ")), 0)
    assert "Traceback" not in done.stderr, done.stderr
    ending = subprocess.CompletedProcess(done.args, done.returncode, "", "\n".join(lines[start:]))
    return sentence(ending, code, *words)


def up(node: AgentProcess, *options: str, **how: object) -> Done:
    """`pointsman up` that is to end by itself."""
    return subprocess.run(
        [
            sys.executable, "-m", "pointsman.cli.main", "up", "--manifests", str(node.manifests),
            "--cgroup", str(node.cgroup), "--bpffs", str(node.root), "--run-dir",
            str(node.run_dir), "--state-dir", str(node.state_dir),
            "--devices", "none", *options,
        ],
        capture_output=True, text=True, timeout=2 * STARTS, **how,  # type: ignore[call-overload]
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """A node with an agent, for what needs one and leaves it as it is."""
    cgroup = Cgroup(f"pm_exit_{os.getpid()}")
    node = AgentProcess(tmp_path_factory.mktemp("exit"), cgroup.path, cgroup.path.name)
    node.write("web.yaml", service("web", VIP))
    node.start()
    yield node
    node.close()
    cgroup.close()


@pytest.fixture(scope="module")
def empty(kernel: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """A node where nothing was ever loaded, for what must not change that."""
    cgroup = Cgroup(f"pm_empty_{os.getpid()}")
    node = AgentProcess(tmp_path_factory.mktemp("empty"), cgroup.path, cgroup.path.name)
    yield node
    cgroup.close()
    assert not node.root.exists()


# -- 2: wrong usage ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        pytest.param(["frobnicate"], "frobnicate", id="no-such-command"),
        pytest.param(["get", "secrets"], "services", id="no-such-resource"),
        pytest.param(["get", "services", "--colour"], "--colour", id="no-such-option"),
        pytest.param(["get", "services", "-o", "xml"], "json", id="no-such-format"),
        pytest.param(["get", "services", "-A", "-n", "x"], "exclude", id="A-with-n"),
        pytest.param(["explain", "10.96.0.1"], "ADDRESS:PORT", id="no-port"),
        pytest.param(["explain", "10.96.0.1:80/sctp"], "tcp or udp", id="sctp"),
        pytest.param(["explain", "10.96.0.1:80", "--open"], "--from", id="open-at-a-socket"),
        pytest.param(["up", "--service-cidr", "10.96.0.1/12"], "10.96.0.0/12", id="bad-cidr"),
        pytest.param(["up", "--service-cidr", "10.96.0.0/30"], "/28", id="small-cidr"),
        pytest.param(["up", "--dns", "dns.example:53"], "127.0.0.1:53", id="dns-by-name"),
        pytest.param(["up", "--max-services", "1"], "16", id="too-small-a-map"),
        pytest.param(
            ["up", "--service-cidr", "10.96.0.0/16", "--service-cidr", "10.97.0.0/16"],
            "already one of IPv4", id="two-cidrs-of-a-family",
        ),
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2_and_says_what_would_be_right(
    empty: AgentProcess, arguments: list[str], word: str
) -> None:
    done = empty.cli(*arguments, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert word in done.stderr
    assert not empty.root.exists()


# -- 3: not root ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["up"], ["load"], ["unload"], ["status"], ["get", "services"], ["explain", "10.96.0.1:80"]],
    ids=" ".join,
)  # fmt: skip
def test_without_root_every_command_ends_with_3(
    kernel: None, missing: Callable[[str], None], arguments: list[str]
) -> None:
    # Another user that may read any file: a checkout can be in a directory of root's.
    capability = "+dac_read_search"
    command = [
        "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
        "--inh-caps", capability, "--ambient-caps", capability,
        sys.executable, "-m", "pointsman.cli.main",
    ]  # fmt: skip
    probe = subprocess.run([*command, "--version"], capture_output=True, text=True, cwd="/")
    if probe.returncode:
        missing(f"setpriv that can keep a capability ({probe.stderr.strip()})")
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd="/")
    sentence(done, 3, "needs root", "sudo")


# -- 4, 5: file systems --------------------------------------------------------------------------


def test_a_cgroup_that_is_no_cgroup2_ends_with_4_and_nothing_is_made(
    empty: AgentProcess, tmp_path: Path
) -> None:
    done = up(empty, "--cgroup", str(tmp_path))
    sentence_after_log(done, 4, f"{tmp_path} is not a cgroup2 directory", "--cgroup")
    assert not empty.root.exists()


def test_a_cgroup_that_is_missing_ends_with_4(empty: AgentProcess) -> None:
    done = up(empty, "--cgroup", f"{empty.cgroup}/missing")
    sentence_after_log(done, 4, "missing is not a cgroup2 directory", "--cgroup")


@pytest.mark.parametrize("command", ["up", "load"])
def test_a_pin_directory_off_bpffs_ends_with_5(
    empty: AgentProcess, tmp_path: Path, command: str
) -> None:
    elsewhere = str(tmp_path / "pins")
    if command == "up":
        done = up(empty, "--bpffs", elsewhere)
    else:
        done = empty.cli("load", "--bpffs", elsewhere, check=False)
    sentence_after_log(done, 5, f"{elsewhere} is not on a bpffs", "/sys/fs/bpf")


def test_a_pin_directory_of_another_user_ends_with_5(empty: AgentProcess) -> None:
    empty.root.mkdir()
    os.chown(empty.root, NOBODY, NOBODY)
    try:
        done = empty.cli("load", check=False)
        sentence(done, 5, f"{empty.root} belongs to user {NOBODY}", "--bpffs")
        assert not list(empty.root.iterdir())
    finally:
        empty.root.rmdir()


def test_a_pin_directory_that_is_a_link_ends_with_5(empty: AgentProcess, tmp_path: Path) -> None:
    empty.root.symlink_to(tmp_path)
    try:
        done = empty.cli("load", check=False)
        sentence(done, 5, str(empty.root), "is no directory", "--bpffs")
    finally:
        empty.root.unlink()


# -- 6, 7: kernel and compiler -------------------------------------------------------------------


def assert_nothing_left(node: AgentProcess) -> None:
    left = [p for p in node.root.rglob("*") if not p.is_dir()] if node.root.exists() else []
    assert not left


def test_a_program_that_the_kernel_refuses_ends_with_6_and_the_verifiers_words(
    node: AgentProcess, changed_source: Callable[..., Path]
) -> None:
    source = changed_source(("sock.c", "#define PROCEED 1", "#define PROCEED 7"))
    # What was kept of the first time tells no less.
    for _ in range(2):
        done = node.cli("load", source=source, check=False)
        first = sentence(done, 6, "R0")
        assert "known to load on Linux 5.10 and newer" in first
        assert_nothing_left(node)


def test_a_source_that_does_not_compile_ends_with_7_and_the_compilers_words(
    node: AgentProcess, changed_source: Callable[..., Path]
) -> None:
    source = changed_source(("sock.c", "#define PROCEED 1", "#error a deliberate mistake"))
    done = node.cli("load", source=source, check=False)
    sentence(done, 7, "a deliberate mistake", "bpf/sock.c")
    assert_nothing_left(node)


def test_without_bcc_loading_ends_with_7_and_names_the_package(
    node: AgentProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "stub" / "bcc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('No module named bcc')\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    done = node.cli("load", check=False)
    sentence(done, 7, "bcc can't be imported", "python3-bpfcc", "--system-site-packages")
    assert_nothing_left(node)


def test_an_agent_that_can_not_load_ends_with_the_same_code_and_frees_its_lock(
    node: AgentProcess, changed_source: Callable[..., Path]
) -> None:
    source = changed_source(("sock.c", "#define PROCEED 1", "#error a deliberate mistake"))
    done = up(node, "--dns", "off", env={**os.environ, "POINTSMAN_SOURCE": str(source)})
    sentence_after_log(done, 7, "a deliberate mistake")
    node.start()


# -- 8: a foreign layout -------------------------------------------------------------------------


def test_a_foreign_map_at_the_place_of_ours_ends_with_8_and_every_difference_named(
    node: AgentProcess,
) -> None:
    pins = Pins(node.root)
    pins.unload()
    pins.prepare_root()
    generation = Generation(node.root / f"g_{pins.fingerprint()}")
    generation.maps.mkdir(parents=True)
    for name, kind, key, value, entries in (("frontends", 2, 4, 12, 7), ("names", 1, 4, 192, 99)):
        fd = bpf.map_create(kind, name, key, value, entries)
        bpf.obj_pin(fd, generation.maps / name)
        os.close(fd)
    done = node.cli("load", check=False)
    sizes = pins.sizes
    names = abi.layouts()["name"].size
    assert names == 192
    sentence(
        done, 8,
        "frontends: type 1, pinned map has 2",
        "frontends: key size 20, pinned map has 4",
        "frontends: value size 4, pinned map has 12",
        f"frontends: max entries {sizes.services}, pinned map has 7",
        f"names: max entries {sizes.services}, pinned map has 99",
        "names: flags 1, pinned map has 0",
        "pointsman unload",
    )  # fmt: skip
    assert "names: key size" not in done.stderr
    assert "names: value size" not in done.stderr
    # What it says to do is what mends it.
    assert node.cli("unload").returncode == 0
    assert node.cli("load").returncode == 0


# -- 9: somebody else is at work -----------------------------------------------------------------


def test_a_second_agent_ends_with_9_and_the_first_one_goes_on(running: AgentProcess) -> None:
    assert running.process
    done = up(running, "--dns", "off")
    sentence_after_log(done, 9, f"pid {running.process.pid}", "stop it first", "--run-dir")
    assert running.process.poll() is None
    assert running.cli("status").returncode == 0


def test_another_run_directory_makes_no_second_writer(
    running: AgentProcess, tmp_path: Path
) -> None:
    other = ["--run-dir", str(tmp_path / "run")]
    done = up(running, "--dns", "off", *other)
    sentence_after_log(done, 9, f"another --run-dir holds {running.root}", "--bpffs")
    for command in ("load", "unload"):
        done = running.cli(command, *other, check=False)
        sentence(done, 9, f"another --run-dir holds {running.root}", "--bpffs")
    assert running.cli("status").returncode == 0


@pytest.mark.parametrize("command", ["load", "unload"])
def test_load_and_unload_end_with_9_while_an_agent_runs(
    running: AgentProcess, command: str
) -> None:
    assert running.process
    done = running.cli(command, check=False)
    sentence(done, 9, f"pid {running.process.pid}", "stop it first")
    assert len(list((running.root / "links").iterdir())) == len(HOOKS)


# -- 10: anything else ---------------------------------------------------------------------------


def test_a_dns_port_that_is_taken_ends_with_10_and_says_how_to_find_out_by_whom(
    empty: AgentProcess,
) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        done = up(empty, "--dns", f"127.0.0.1:{port}")
    first = sentence_after_log(done, 10, f"127.0.0.1 port {port}", "Address already in use", "ss ")
    assert "Errno" not in first
    assert not empty.root.exists()


def test_a_state_directory_that_can_not_be_made_ends_with_10(
    empty: AgentProcess, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    done = up(empty, "--state-dir", str(tmp_path / "file" / "state"), "--dns", "off")
    sentence_after_log(done, 10, str(tmp_path / "file"))


@pytest.mark.parametrize("command", ["up", "load", "unload"])
def test_a_run_directory_that_can_not_be_made_ends_with_10(
    empty: AgentProcess, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("")
    run_dir = ["--run-dir", str(tmp_path / "file" / "run")]
    if command == "up":
        done = up(empty, "--dns", "off", *run_dir)
    else:
        done = empty.cli(command, *run_dir, check=False)
    sentence_after_log(done, 10, run_dir[1])


# -- 11, 12: nothing there -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["status"], ["get", "services"], ["get", "endpoints", "-o", "json"], ["map", "list"],
     ["map", "dump", "services"], ["explain", "10.96.0.1:80"], ["describe", "service", "web"]],
    ids=" ".join,
)  # fmt: skip
def test_with_nothing_loaded_reading_ends_with_11_and_says_how_to_load(
    empty: AgentProcess, arguments: list[str]
) -> None:
    done = empty.cli(*arguments, check=False)
    # `describe` tells before that it looks for the manifests of an agent in vain.
    sentence_after_log(done, 11, "nothing is loaded", "pointsman up")


def test_verify_with_nothing_loaded_ends_with_11(empty: AgentProcess) -> None:
    done = empty.cli("verify", "--manifests", str(empty.manifests), check=False)
    sentence(done, 11, "nothing is loaded", "pointsman up")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        pytest.param(["get", "services", "nope"], "pointsman get services", id="service"),
        pytest.param(["get", "endpoints", "web", "-n", "other"], "other", id="namespace"),
        pytest.param(["describe", "service", "nope"], "pointsman get services", id="describe"),
        pytest.param(["map", "dump", "nope"], "frontends", id="map"),
        pytest.param(["verify", "--manifests", "/no/such"], "--manifests", id="manifests"),
    ],
)
def test_what_is_not_there_ends_with_12_and_says_where_to_look(
    running: AgentProcess, arguments: list[str], word: str
) -> None:
    sentence(running.cli(*arguments, check=False), 12, word)


# -- 0: what goes well ---------------------------------------------------------------------------


def test_an_agent_without_its_manifests_directory_says_so_and_goes_on_when_it_appears(
    node: AgentProcess,
) -> None:
    node.manifests.rmdir()
    node.start(wait=False)
    assert node.process

    def told() -> bool:
        assert node.process and node.process.poll() is None, node.log.read_text()
        return any("missing" in p["message"] for p in node.status().get("problems", ()))

    until(told, "the missing directory in the status")
    problem = node.status()["problems"][0]
    assert problem["where"] == str(node.manifests)
    assert "make it" in problem["mend"]
    assert node.cli("status", check=False).returncode in (1, 11)
    with everyone() as servers:
        node.manifests.mkdir()
        node.write("web.yaml", service("web", VIP))
        node.write("slices.yaml", endpoints("web", ("10.244.0.1", servers.port)))
        until(lambda: servers.reached(VIP) == "10.244.0.1", "the Service of the directory")
        until(lambda: not node.status()["problems"], "no problem any more")
    assert node.cli("status").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_ends_the_agent_with_0_and_the_kernel_goes_on(
    node: AgentProcess, number: signal.Signals
) -> None:
    with everyone() as servers:
        node.write("web.yaml", service("web", VIP))
        node.write("slices.yaml", endpoints("web", ("10.244.0.1", servers.port)))
        node.start()
        assert node.process
        node.process.send_signal(number)
        assert node.process.wait(STARTS) == 0, node.log.read_text()
        assert "Traceback" not in node.log.read_text()
        assert len(list((node.root / "links").iterdir())) == len(HOOKS)
        assert servers.reached(VIP) == "10.244.0.1"
        done = node.cli("status", "-o", "json", check=False)
        assert done.returncode == 1
        assert "the agent is not running" in done.stdout


def test_unload_removes_everything_that_is_ours_and_nothing_else_also_when_run_twice(
    node: AgentProcess,
) -> None:
    foreign = node.root / "somebody_elses"
    with everyone() as servers:
        node.write("web.yaml", service("web", VIP))
        node.write("slices.yaml", endpoints("web", ("10.244.0.1", servers.port)))
        node.start()
        fd = bpf.map_create(2, "foreign", 4, 4, 1)
        bpf.obj_pin(fd, foreign)
        os.close(fd)
        held = socket.create_connection((VIP, 80))
        node.stop()
        done = node.cli("unload")
        try:
            for hook in HOOKS:
                assert f"links/{hook.name}" in done.stdout
            assert list(node.root.iterdir()) == [foreign]
            assert servers.reached(VIP) == "ENETUNREACH", "still translated"
            # "Connections that are open stay open": the endpoint is its peer, as for any socket.
            assert held.getpeername() == ("10.244.0.1", servers.port)
            held.close()
            again = node.cli("unload")
            assert "nothing is loaded" in again.stdout
            assert list(node.root.iterdir()) == [foreign]
        finally:
            foreign.unlink()
        node.cli("unload")
        assert not node.root.exists()


def test_once_it_is_unloaded_no_program_runs(fresh_lab: Callable[..., Lab]) -> None:
    """Not a moment later, when the kernel gets to it: then connects could fail yet."""
    lab = fresh_lab()
    lab.serve(VIP, 80, TCP)

    def connect() -> str:
        with socket.socket() as client:
            return errno.errorcode[client.connect_ex((VIP, 80))]

    for _ in range(60):  # it would be soon enough most of the time
        assert connect() == of_this_kernel("ECONNREFUSED"), "it has no endpoints"
        SocketLinks(lab.root).remove_all()
        assert connect() == "ENETUNREACH"
        lab.attach()


def test_what_was_unloaded_can_be_loaded_again(node: AgentProcess) -> None:
    assert "loaded and pinned" in node.cli("load").stdout
    assert "already pinned" in node.cli("load").stdout
    assert not (node.root / "links").exists(), "load attaches nothing"
    node.cli("unload")
    shutil.rmtree(node.run_dir)
    assert "loaded and pinned" in node.cli("load").stdout
