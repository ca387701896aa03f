"""The way to an API server, over real sockets: what is asked, what fails and how that is told."""

from __future__ import annotations

import base64
import gc
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kubernetes.config import incluster_config

from pointsman.errors import NoCluster
from pointsman.kube.access import Access
from pointsman.kube.api import ApiError
from pointsman.kube.client import ApiServer
from tests.support.fakeapi import FakeApi

LIST = ("/api/v1/services", {"limit": "500"})
WATCH = ("/api/v1/services", {"resourceVersion": "100"})


@pytest.fixture
def api() -> Iterator[FakeApi]:
    with FakeApi() as api:
        yield api


def service(name: str) -> dict[str, object]:
    return {"metadata": {"name": name, "namespace": "default"}}


def kubeconfig(directory: Path, url: str, user: object = None, cluster: object = None) -> Path:
    path = directory / "kubeconfig"
    value = {
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": url, **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
    }
    path.write_text(json.dumps(value))
    return path


def client(api: FakeApi, **more: float) -> ApiServer:
    return ApiServer(Access(server=api.url), **more)


def test_a_list_is_read_whole(api: FakeApi) -> None:
    api.put("services", service("web"))
    page = json.loads(client(api).get(*LIST))
    assert [item["metadata"]["name"] for item in page["items"]] == ["web"]
    assert api.asked("services", "list") == [{"limit": "500"}]


@pytest.mark.parametrize(
    "fault, status, reason",
    [
        pytest.param("403", 403, "Forbidden", id="a-refusal-keeps-its-reason"),
        pytest.param("429:7", 429, "TooManyRequests", id="too-many-requests"),
        pytest.param("cut", 0, "Unreachable", id="a-cut-before-the-answer"),
        pytest.param("half", 0, "Cut", id="half-an-answer"),
        pytest.param("stall", 0, "Cut", id="an-answer-that-stalls"),
        pytest.param("drip", 0, "Cut", id="an-answer-that-drips-without-end"),
    ],
)
def test_a_failed_list_says_how(api: FakeApi, fault: str, status: int, reason: str) -> None:
    for number in range(50):  # of one alone the rest would have dripped in by then
        api.put("services", service(f"s{number}"))
    api.fault("services", "list", fault)
    patience = 1 if fault in ("stall", "drip") else 60
    with pytest.raises(ApiError) as error:
        client(api, read_timeout=patience).get(*LIST)
    assert (error.value.status, error.value.reason) == (status, reason)
    assert error.value.retry_after == (7 if status == 429 else 0)


def test_nobody_at_the_address_is_told_with_the_address() -> None:
    with FakeApi() as gone:
        pass
    with pytest.raises(ApiError, match=gone.url) as error:
        client(gone).get(*LIST)
    assert error.value.status == 0


def test_a_watch_gives_complete_lines_and_ends_with_the_server(api: FakeApi) -> None:
    stream = client(api).stream(*WATCH, seconds=300)
    api.put("services", service("a"))
    lines = iter(stream)
    assert json.loads(next(lines)[0])["type"] == "ADDED"
    api.end_watches()
    assert list(lines) == []


@pytest.mark.parametrize("fault", ["cut", "half", "stall", "drip"])
def test_a_watch_that_breaks_off_is_an_error(api: FakeApi, fault: str) -> None:
    api.fault("services", "watch", fault)
    stream = client(api, slack=0.1).stream(*WATCH, seconds=0)
    api.put("services", service("a"))
    with pytest.raises(ApiError) as error:
        list(stream)
    assert (error.value.status, error.value.reason) == (0, "Cut")


def test_a_watch_without_even_a_bookmark_ends_to_be_asked_anew(api: FakeApi) -> None:
    stream = client(api, silence=0.1).stream(*WATCH, seconds=300)
    assert list(stream) == []


def test_keys_in_a_kubeconfig_s_text_go_where_only_we_look_in(api: FakeApi, tmp_path: Path) -> None:
    """OpenSSL reads them from files only. An agent that was killed takes none away."""
    keys = tmp_path / "keys"
    keys.mkdir()
    (keys / "left").write_text("of one that was killed")
    text = base64.b64encode(b"a certificate").decode()
    url = api.url.replace("http:", "https:")
    path = kubeconfig(tmp_path, url, {"token": "t"}, {"certificate-authority-data": text})
    ApiServer(Access(path), keys=keys)
    (file,) = keys.iterdir()
    assert file.read_bytes() == b"a certificate"
    assert (keys.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)


def test_closing_a_watch_wakes_its_reader(api: FakeApi) -> None:
    stream = client(api).stream(*WATCH, seconds=300)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    stream.close()
    reader.join(60)
    assert not reader.is_alive()


def test_a_token_that_is_renewed_in_its_file_is_read_after_a_401(
    api: FakeApi, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("old")
    api.token = "old"
    user = {"tokenFile": str(token)}
    server = ApiServer(Access(kubeconfig(tmp_path, api.url, user)))
    server.get(*LIST)
    api.token = "new"
    with pytest.raises(ApiError) as error:
        server.get(*LIST)
    assert error.value.status == 401
    token.write_text("new")
    server.get(*LIST)
    assert len(api.asked("services", "list")) == 5  # each 401 was tried once more, no oftener


def test_hours_of_a_refused_token_take_no_descriptors(api: FakeApi, tmp_path: Path) -> None:
    """Each 401 has the credentials read again, and with them come new connections."""
    api.token = "new"
    user = {"token": "old"}
    server = ApiServer(Access(kubeconfig(tmp_path, api.url, user)))

    def refused() -> int:
        with pytest.raises(ApiError):
            server.get(*LIST)
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    gc.disable()  # as the agent does while it starts
    try:
        refused()
        before = refused()
        assert max(refused() for _ in range(30)) <= before + 6
    finally:
        gc.enable()


def test_an_authority_that_is_replaced_in_its_file_is_trusted_from_then_on(
    certificate: tuple[Path, Path], tmp_path: Path, missing: Callable[[str], None]
) -> None:
    cert, key = tmp_path / "other.pem", tmp_path / "other.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
    command += f"-subj /CN=other -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    authority = tmp_path / "ca.pem"
    shutil.copy(certificate[0], authority)
    with FakeApi((cert, key)) as api:
        cluster = {"certificate-authority": str(authority)}
        server = ApiServer(Access(kubeconfig(tmp_path, api.url, cluster=cluster)))
        with pytest.raises(ApiError, match="certificate verify failed") as error:
            server.get(*LIST)
        assert error.value.reason == "Untrusted"
        shutil.copy(cert, authority)
        server.get(*LIST)


def test_a_token_of_an_exec_plugin_is_used(api: FakeApi, tmp_path: Path) -> None:
    api.token = "made"
    status = {"kind": "ExecCredential", "apiVersion": "client.authentication.k8s.io/v1"}
    status |= {"status": {"token": "made"}}
    plugin = {"apiVersion": status["apiVersion"], "command": "echo", "args": [json.dumps(status)]}
    plugin |= {"interactiveMode": "Never"}
    ApiServer(Access(kubeconfig(tmp_path, api.url, {"exec": plugin}))).get(*LIST)


@pytest.mark.parametrize(
    "access, said",
    [
        pytest.param(Access(), "--kubeconfig", id="nothing-configured"),
        pytest.param(Access(Path("/nowhere")), "/nowhere", id="no-such-file"),
        pytest.param(Access(Path(__file__)), "test_kube_client", id="no-kubeconfig"),
    ],
)
def test_a_configuration_that_leads_nowhere_is_refused(
    access: Access, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(NoCluster, match=said):
        ApiServer(access)


def test_a_context_that_is_missing_is_named(api: FakeApi, tmp_path: Path) -> None:
    with pytest.raises(NoCluster, match="elsewhere"):
        ApiServer(Access(kubeconfig(tmp_path, api.url), "elsewhere"))


def test_what_is_posted_arrives_as_json(api: FakeApi) -> None:
    server = client(api)
    server.post("/api/v1/namespaces/default/events", {"a": 1})
    server.patch("/api/v1/namespaces/default/events/x", {"count": 2})
    assert [json.loads(body) for _, _, body in api.posted] == [{"a": 1}, {"count": 2}]


@pytest.fixture(scope="session")
def certificate(
    tmp_path_factory: pytest.TempPathFactory, missing: Callable[[str], None]
) -> tuple[Path, Path]:
    """Of an API server whose Service is at 127.0.0.9, as its own CA."""
    if not shutil.which("openssl"):
        missing("openssl")
    directory = tmp_path_factory.mktemp("pki")
    cert, key = directory / "cert.pem", directory / "key.pem"
    names = "subjectAltName=DNS:kubernetes.default.svc,IP:127.0.0.9"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
    command += f"-subj /CN=fake -addext {names} -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key


@pytest.fixture
def in_pod(
    certificate: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], ApiServer]]:
    """A pod whose Service `kubernetes` is at 127.0.0.9, where nobody listens yet."""
    (tmp_path / "token").write_text("secret\n")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificate[0]))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.9")
    with FakeApi(address="127.0.0.9") as placeholder:
        port = placeholder.port
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(port))
    yield lambda: ApiServer(Access())


def test_an_untranslated_cluster_ip_is_gone_round_by_what_was_remembered(
    in_pod: Callable[[], ApiServer], certificate: tuple[Path, Path]
) -> None:
    with FakeApi(certificate, address="127.0.0.8") as real:
        real.token = "secret"
        server = in_pod()
        with pytest.raises(ApiError, match=r"https://127\.0\.0\.9.*--api-server"):
            server.get(*LIST)
        server.remember((), (real.url,))
        server.get(*LIST)  # 127.0.0.8 is no name of the certificate; the Service's is
        assert server.server == real.url
        stream = server.stream(*WATCH, seconds=300)
        real.put("services", service("a"))
        assert next(iter(stream))
        stream.close()
        server.remember((), ())  # an empty Service takes nothing away
        server.get(*LIST)


def test_a_remembered_address_that_is_another_s_by_now_gets_no_token(
    in_pod: Callable[[], ApiServer], tmp_path: Path, missing: Callable[[str], None]
) -> None:
    key, cert = tmp_path / "k.pem", tmp_path / "c.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes "
    command += f"-subj /CN=other -addext subjectAltName=IP:127.0.0.9 -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    with FakeApi((cert, key), address="127.0.0.8") as stranger:
        server = in_pod()
        server.remember((), (stranger.url,))
        with pytest.raises(ApiError, match="certificate verify failed"):
            server.get(*LIST)
        assert stranger.requests == []


def test_a_configured_address_that_is_not_the_service_is_never_gone_round(
    api: FakeApi, tmp_path: Path
) -> None:
    with FakeApi() as gone:
        pass
    server = ApiServer(Access(kubeconfig(tmp_path, gone.url)))
    server.remember(("10.0.0.1",), (api.url,))
    with pytest.raises(ApiError):
        server.get(*LIST)
    assert api.requests == []
