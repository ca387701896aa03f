"""Files in, objects and problems out; and a real directory watched by a real thread."""

from __future__ import annotations

import json
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointsman.events import Changed, Event, Listed, Problem, Problems
from pointsman.manifests import ManifestSource
from pointsman.objects import Object, Pod, Ref, Service


def service(name: str = "web", port: object = 80, extra: str = "") -> str:
    return f"""\
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  ports: [{{port: {port}}}]
{extra}---
"""


def manifests(directory: Path, **ports: int) -> None:
    """A file for each Service, in the directory, which is made if need be."""
    directory.mkdir(exist_ok=True)
    for name, port in ports.items():
        (directory / f"{name}.yaml").write_text(service(name, port))


def refuse_to_list(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As for a user without the right; the tests may run as root, who may read everything."""
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path == str(folder):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def ref(name: str = "web", namespace: str = "default") -> Ref:
    return Ref("Service", namespace, name)


def look(source: ManifestSource) -> tuple[dict[str, int], list[Problem]]:
    """Each Service's name and port, and the errors and warnings."""
    listed, problems = source.read()
    return ports(listed.objects), list(problems.problems)


def ports(objects: tuple[Object, ...]) -> dict[str, int]:
    return {o.metadata.name: o.spec.ports[0].port for o in objects if isinstance(o, Service)}


def only(directory: Path, text: str, name: str = "web.yaml") -> Problem:
    (directory / name).write_text(text)
    found, (problem,) = look(ManifestSource(directory))
    assert found == {}
    assert problem.where == str(directory / name)
    assert problem.mend
    return problem


class TestReading:
    def test_reads_every_manifest_of_nested_folders(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(service("a", 1) + "---\n# no\n---\n" + service("b", 2))
        (tmp_path / "deep" / "er").mkdir(parents=True)
        (tmp_path / "deep" / "er" / "c.yml").write_text(service("c", 3))
        document = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "d"}}
        document["spec"] = {"ports": [{"port": 4}]}
        listing = {"apiVersion": "v1", "kind": "List", "items": [document]}
        (tmp_path / "d.json").write_text(json.dumps(listing))
        typed = {"metadata": {"name": "e"}, "spec": {"ports": [{"port": 5}]}}
        listing = {"apiVersion": "v1", "kind": "ServiceList", "items": [typed]}
        (tmp_path / "e.yaml").write_text(json.dumps(listing))
        assert look(ManifestSource(tmp_path)) == ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, [])

    @pytest.mark.parametrize("name", [".a.yaml.swp", "a.yaml~", ".#a.yaml", ".a.yaml", "a.txt"])
    def test_passes_over_editors_files(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text(service())
        assert look(ManifestSource(tmp_path)) == ({}, [])

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param("{apiVersion: apps/v1, kind: Deployment}", id="deployment"),
            pytest.param("{apiVersion: v1, kind: ConfigMap, data: {a: !!str 1}}", id="config-map"),
            pytest.param("{apiVersion: serving.knative.dev/v1, kind: Service}", id="others-kind"),
            pytest.param("# only a comment", id="empty"),
        ],
    )
    def test_passes_over_what_is_not_its_business(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "x.yaml").write_text(text)
        assert look(ManifestSource(tmp_path)) == ({}, [])

    @pytest.mark.parametrize(
        ("spec", "port"),
        [
            pytest.param("ports: [{port: 80}]\n  selector:\n  clusterIPs: null", 80, id="nulls"),
            pytest.param("ports: [{port: 0x50}]", 80, id="hexadecimal"),
            pytest.param("ports: &p [{port: 80}]\n  other: *p", 80, id="an-alias"),
            pytest.param("<<: {ports: [{port: 80}], type: ClusterIP}", 80, id="a-merge"),
            pytest.param("<<: {ports: [{port: 1}]}\n  ports: [{port: 80}]", 80, id="own-wins"),
        ],
    )
    def test_reads_yaml_as_kubectl_does(self, tmp_path: Path, spec: str, port: int) -> None:
        text = (
            f"apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  labels:\nspec:\n  {spec}\n"
        )
        (tmp_path / "a.yaml").write_text(text)
        assert look(ManifestSource(tmp_path)) == ({"web": port}, [])

    def test_dates_may_be_quoted_or_not_and_a_null_label_is_empty(self, tmp_path: Path) -> None:
        text = """\
apiVersion: v1
kind: Pod
metadata:
  name: p
  namespace: ""
  labels: {tier: }
  annotations: {day: 2024-01-31}
  creationTimestamp: 2024-01-31T12:00:00Z
  deletionTimestamp: "2024-01-31T12:00:00Z"
status: {podIP: 10.0.0.1, conditions: [{type: Ready, status: "True"}]}
"""
        (tmp_path / "a.yaml").write_text(text)
        listed, problems = ManifestSource(tmp_path).read()
        (pod,) = listed.objects
        assert isinstance(pod, Pod)
        assert problems.problems == ()
        assert pod.ref == Ref("Pod", "default", "p")
        assert pod.metadata.creation_timestamp == pod.metadata.deletion_timestamp is not None
        assert (pod.metadata.labels, pod.metadata.annotations) == (
            {"tier": ""},
            {"day": "2024-01-31"},
        )


class TestBadInput:
    @pytest.mark.parametrize(
        ("text", "name", "field", "message", "mend"),
        [
            pytest.param(
                service(port='"80"'),
                str(ref()),
                "spec.ports[0].port",
                '"80"',
                "quotes",
                id="quoted",
            ),
            pytest.param(
                service(port=80.5), str(ref()), "spec.ports[0].port", "80.5", "whole", id="float"
            ),
            pytest.param(
                service(port=70000), str(ref()), "spec.ports[0].port", "70000", "65535", id="range"
            ),
            pytest.param(
                service(extra="  selector: {version: 1}\n"),
                str(ref()),
                "spec.selector[version]",
                "got 1",
                "quote it",
                id="a-number-as-label",
            ),
            pytest.param(
                "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: {port: 80}}}",
                str(ref()),
                "spec.ports",
                "a mapping",
                "list",
                id="no-list",
            ),
            pytest.param(
                "{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {ports: [{}]}}",
                str(ref()),
                "spec.ports[0].port",
                "missing",
                "add port",
                id="missing-field",
            ),
            pytest.param(
                "{apiVersion: v1, kind: Pod, metadata: {name: p, creationTimestamp: today}}",
                "Pod default/p",
                "metadata.creationTimestamp",
                '"today"',
                "2024",
                id="no-date",
            ),
            pytest.param(
                "{apiVersion: v1, kind: Service}",
                "",
                "metadata",
                "missing",
                "add",
                id="no-metadata",
            ),
            pytest.param("{apiVersion: v1}", "", "kind", "document 1", "add kind", id="no-kind"),
            pytest.param("{kind: Service}", "", "apiVersion", "no", "add", id="no-api-version"),
            pytest.param(
                "{apiVersion: v1, kind: Servce}", "", "kind", "Servce", "write Service", id="typo"
            ),
            pytest.param(
                "{apiVersion: discovery.k8s.io/v1beta1, kind: EndpointSlice, metadata: {name: e}}",
                "EndpointSlice default/e",
                "apiVersion",
                "v1beta1",
                "discovery.k8s.io/v1",
                id="old-api-version",
            ),
            pytest.param("just words", "", "", "document 1", "kind", id="no-object"),
            pytest.param("{a: [", "", "", "malformed YAML", "mend", id="malformed"),
            pytest.param("{a: 1, a: 2}", "", "", '"a" is there twice', "delete", id="twice"),
            pytest.param(
                "a: !!python/object:os.system x", "", "", "tag", "remove", id="python-tag"
            ),
            pytest.param("&a [*a]", "", "", "anchor", "anchor", id="an-alias-of-itself"),
            pytest.param("[" * 70 + "]" * 70, "", "", "levels", "flatter", id="deep"),
            pytest.param("[" * 99999, "", "", "levels", "flatter", id="very-deep"),
            pytest.param("a: \0", "", "", "binary", "text", id="binary"),
            pytest.param("a: \a", "", "", "malformed", "remove", id="control-characters"),
        ],
    )
    def test_names_file_object_field_and_mend(
        self, tmp_path: Path, text: str, name: str, field: str, message: str, mend: str
    ) -> None:
        (tmp_path / "web.yaml").write_text(text)
        found, problems = look(ManifestSource(tmp_path))
        problem = problems[0]
        assert found == {}
        assert problem.where == str(tmp_path / "web.yaml")
        assert (problem.object, problem.field, problem.severity) == (name, field, "error")
        assert message in problem.message
        assert mend in problem.mend

    def test_legacy_endpoints_are_a_warning(self, tmp_path: Path) -> None:
        problem = only(tmp_path, "{apiVersion: v1, kind: Endpoints, metadata: {name: web}}")
        assert problem.severity == "warning"
        assert "EndpointSlice" in problem.mend

    def test_malformed_json_is_a_problem(self, tmp_path: Path) -> None:
        assert "malformed JSON" in only(tmp_path, '{"a": 1', "a.json").message
        assert "malformed JSON" in only(tmp_path, "[" * 99999, "a.json").message

    def test_a_file_that_is_too_large_is_never_opened(self, tmp_path: Path) -> None:
        (tmp_path / "big.yaml").touch()
        os.truncate(tmp_path / "big.yaml", 100 << 20)
        (problem,) = ManifestSource(tmp_path).read()[1].problems
        assert str(100 << 20) in problem.message

    def test_a_pipe_does_not_block(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.yaml")
        (problem,) = ManifestSource(tmp_path).read()[1].problems
        assert "no regular file" in problem.message

    def test_a_bomb_of_aliases_is_refused(self, tmp_path: Path) -> None:
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
        lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
        assert "aliases" in only(tmp_path, "\n".join(lines)).message

    def test_a_link_in_a_circle_is_walked_once(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "up").symlink_to(tmp_path)
        (tmp_path / "self").symlink_to(tmp_path / "self")
        (tmp_path / "sub" / "a.yaml").write_text(service())
        assert look(ManifestSource(tmp_path)) == ({"web": 80}, [])

    @settings(
        max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        st.one_of(
            st.binary(max_size=200),
            st.text(alphabet="{}[]:,-&*!|>'\"\n <a1#%@`?~=.", max_size=80).map(str.encode),
        )
    )
    def test_no_bytes_whatever_raise(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "good.yaml").write_text(service())
        for suffix in ("yaml", "json"):
            (tmp_path / f"x.{suffix}").write_bytes(data)
        assert look(ManifestSource(tmp_path))[0] == {"web": 80}

    _JSON = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["ports", "port", "labels", "name", "addresses", "podIPs", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )

    @settings(
        max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        st.sampled_from(["Service", "Pod", "EndpointSlice", "List", "PodList"]), _JSON, _JSON, _JSON
    )
    def test_no_values_whatever_raise(
        self, tmp_path: Path, kind: str, metadata: object, spec: object, items: object
    ) -> None:
        document = {"apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": spec}
        document |= {"status": spec, "items": items, "endpoints": items, "addressType": "IPv4"}
        (tmp_path / "x.yaml").write_text(json.dumps(document))
        for problem in ManifestSource(tmp_path).read()[1].problems:
            assert problem.message
            assert problem.mend


class TestLastGoodVersion:
    @pytest.mark.parametrize(
        "bad",
        [
            pytest.param(service("web", 0) + service("b", 3), id="the-object-is-bad"),
            pytest.param(service("web", '"x"') + service("b", 3), id="it-has-a-wrong-type"),
            pytest.param(service("b", 3) + "a: {", id="the-rest-is-malformed"),
            pytest.param(service("b", 3) + "--- {a: 1, a: 1}\n", id="a-document-is-malformed"),
        ],
    )
    def test_stays_in_force_and_the_others_go_on(self, tmp_path: Path, bad: str) -> None:
        file = tmp_path / "a.yaml"
        file.write_text(service("web", 1) + service("b", 2))
        source = ManifestSource(tmp_path)
        assert look(source) == ({"web": 1, "b": 2}, [])
        file.write_text(bad)
        found, (problem,) = look(source)
        assert found == {"web": 1, "b": 3}
        assert problem.severity == "error"
        file.write_text(service("web", 4))
        assert look(source) == ({"web": 4}, [])

    @pytest.mark.parametrize(
        "data",
        [b"\0", b"\xff\xfe", b"a: [", b"x" * 2000],
        ids=["binary", "no-utf-8", "malformed", "too-large"],
    )
    def test_stays_in_force_when_the_whole_file_is_bad(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "a.yaml").write_text(service())
        source = ManifestSource(tmp_path, max_bytes=1000)
        look(source)
        (tmp_path / "a.yaml").write_bytes(data)
        found, problems = look(source)
        assert (found, len(problems)) == ({"web": 80}, 1)
        (tmp_path / "a.yaml").unlink()
        assert look(source) == ({}, [])

    def test_a_document_after_a_refused_one_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("{a: 1, a: [1, {}]}\n---\n" + service())
        found, problems = look(ManifestSource(tmp_path))
        assert (found, len(problems)) == ({"web": 80}, 1)

    def test_moving_an_object_to_a_file_where_it_is_bad_keeps_it(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(service("web", 1))
        source = ManifestSource(tmp_path)
        look(source)
        (tmp_path / "a.yaml").unlink()
        (tmp_path / "b.yaml").write_text(service("web", 0))
        assert look(source)[0] == {"web": 1}

    def test_a_folder_that_became_unreadable_takes_nothing_away(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "sub"
        folder.mkdir()
        (folder / "a.yaml").write_text(service("a"))
        (tmp_path / "b.yaml").write_text(service("b"))
        source = ManifestSource(tmp_path)
        look(source)
        refuse_to_list(monkeypatch, folder)
        (tmp_path / "b.yaml").unlink()
        found, (problem,) = look(source)
        assert found == {"a": 80}
        assert problem.where == str(folder)

    def test_a_file_that_is_a_link_to_itself_takes_nothing_away(self, tmp_path: Path) -> None:
        file = tmp_path / "a.yaml"
        file.write_text(service())
        source = ManifestSource(tmp_path)
        look(source)
        file.unlink()
        file.symlink_to(file)
        found, (problem,) = look(source)
        assert (found, problem.where) == ({"web": 80}, str(file))


class TestOneObjectInTwoFiles:
    def test_the_first_keeps_it_the_problem_names_both_and_the_other_takes_over(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "b.yaml").write_text(service("web", 2))
        source = ManifestSource(tmp_path)
        look(source)
        (tmp_path / "a.yaml").write_text(service("web", 1))
        found, (problem,) = look(source)
        assert found == {"web": 2}
        assert (problem.where, problem.object) == (str(tmp_path / "a.yaml"), str(ref()))
        assert str(tmp_path / "b.yaml") in problem.message
        (tmp_path / "b.yaml").write_text(service("web", 0))
        assert look(source)[0] == {"web": 2}
        (tmp_path / "b.yaml").unlink()
        assert look(source) == ({"web": 1}, [])

    def test_at_first_the_order_of_paths_decides(self, tmp_path: Path) -> None:
        for port, name in enumerate(["a.yaml", "b.yaml", "c/a.yaml"], 1):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(service("web", port))
        found, problems = look(ManifestSource(tmp_path))
        assert (found, len(problems)) == ({"web": 1}, 2)

    def test_twice_in_one_file_is_a_problem_too(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(service("web", 1) + service("web", 2))
        found, (problem,) = look(ManifestSource(tmp_path))
        assert found == {"web": 1}
        assert "document 2" in problem.message


class Watched:
    """A source that runs in a thread, and what it has said so far."""

    def __init__(self) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.first: Event | None = None
        self.listed = 0
        self.state: dict[Ref, Object] = {}
        self.problems: tuple[Problem, ...] = ()
        self.changes: list[Changed] = []

    def until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < deadline, (self.state, self.problems)
            try:
                self._apply(self.events.get(timeout=0.05))
            except queue.Empty:
                continue

    def stays(self, so: Callable[[], bool]) -> bool:
        """True if it is still so after some looks of the source."""
        deadline = time.monotonic() + 0.6
        self.until(lambda: time.monotonic() > deadline or not so())
        return so()

    def until_ports(self, **expected: int) -> None:
        self.until(lambda: ports(tuple(self.state.values())) == expected)

    def _apply(self, event: Event) -> None:
        self.first = self.first or event
        match event:
            case Listed():
                self.listed += 1
                self.state = {o.ref: o for o in event.objects}
            case Changed():
                self.changes.append(event)
                self.state |= {o.ref: o for o in event.objects}
                for gone in event.deleted:
                    del self.state[gone]
            case Problems():
                assert event.problems != self.problems
                self.problems = event.problems


@contextmanager
def watching(directory: Path, rescan: float = 30.0, patience: float = 30.0) -> Iterator[Watched]:
    watched, stop = Watched(), threading.Event()
    source = ManifestSource(directory, quiet=0.03, rescan=rescan, patience=patience)
    thread = threading.Thread(target=source.run, args=(watched.events.put, stop))
    thread.start()
    try:
        watched.until(lambda: watched.first is not None)
        yield watched
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


class TestWatching:
    def test_writes_renames_and_deletions_are_picked_up(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(service("a", 1))
        with watching(tmp_path) as watched:
            watched.until_ports(a=1)
            (tmp_path / "b.yaml").write_text(service("b", 2))
            watched.until_ports(a=1, b=2)
            (tmp_path / ".a.yaml.tmp").write_text(service("a", 3))
            (tmp_path / ".a.yaml.tmp").rename(tmp_path / "a.yaml")
            watched.until_ports(a=3, b=2)
            (tmp_path / "b.yaml").unlink()
            watched.until_ports(a=3)
            assert watched.changes[-1] == Changed((), (ref("b"),))

    def test_what_is_being_written_says_what_it_said(self, tmp_path: Path) -> None:
        """As `kubectl get … > FILE` does it, which empties the file and fills it later."""
        (tmp_path / "a.yaml").write_text(service("a", 1) + service("b", 2))
        with watching(tmp_path) as watched:
            watched.until_ports(a=1, b=2)
            with (tmp_path / "a.yaml").open("w") as file:
                (tmp_path / "c.yaml").write_text(service("c", 3))
                watched.until_ports(a=1, b=2, c=3)
                file.write(service("a", 4))
                file.flush()
                assert watched.stays(lambda: len(watched.state) == 3)
                file.write(service("b", 5))
            watched.until_ports(a=4, b=5, c=3)
            assert all(not change.deleted for change in watched.changes)
            (tmp_path / "a.yaml").write_text("")
            watched.until_ports(c=3)

    def test_a_file_that_nobody_closes_is_read_in_the_end(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(service("a", 1))
        with watching(tmp_path, rescan=0.5, patience=1.0) as watched:
            watched.until_ports(a=1)
            with (tmp_path / "a.yaml").open("w") as file:
                file.write(service("a", 2))
                file.flush()
                watched.until_ports(a=2)

    def test_a_file_that_took_the_place_of_one_that_is_being_written_counts_at_once(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "a.yaml").write_text(service("a", 1))
        (tmp_path / "good").write_text(service("a", 2))
        with watching(tmp_path, patience=3600) as watched:
            watched.until_ports(a=1)
            with (tmp_path / "a.yaml").open("w"):
                assert watched.stays(lambda: len(watched.state) == 1)
                (tmp_path / "good").rename(tmp_path / "a.yaml")
                watched.until_ports(a=2)

    def test_a_file_that_is_gone_before_it_was_closed_is_gone(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text(service("a", 1))
        with watching(tmp_path) as watched:
            watched.until_ports(a=1)
            with (tmp_path / "a.yaml").open("a") as file:
                file.write(service("b", 2))
                file.flush()
                (tmp_path / "a.yaml").unlink()
                watched.until_ports()
                (tmp_path / "a.yaml").write_text(service("a", 3))
                watched.until_ports(a=3)

    def test_folders_made_moved_and_removed_are_picked_up(self, tmp_path: Path) -> None:
        with watching(tmp_path) as watched:
            (tmp_path / "x" / "y").mkdir(parents=True)
            (tmp_path / "x" / "y" / "a.yaml").write_text(service("a", 1))
            watched.until_ports(a=1)
            (tmp_path / "x").rename(tmp_path / "z")
            (tmp_path / "z" / "y" / "a.yaml").write_text(service("a", 2))
            watched.until_ports(a=2)
            shutil.rmtree(tmp_path / "z")
            watched.until_ports()

    def test_the_data_link_of_a_config_map_is_followed_when_it_is_swapped(
        self, tmp_path: Path
    ) -> None:
        def version(name: str, port: int) -> None:
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.yaml").write_text(service("a", port))
            (tmp_path / "..data_tmp").symlink_to(name)
            (tmp_path / "..data_tmp").rename(tmp_path / "..data")

        version("..2024_01", 1)
        (tmp_path / "a.yaml").symlink_to("..data/a.yaml")
        with watching(tmp_path) as watched:
            watched.until_ports(a=1)
            assert watched.problems == ()
            version("..2024_02", 2)
            watched.until_ports(a=2)
            shutil.rmtree(tmp_path / "..2024_01")
            version("..2024_03", 3)
            watched.until_ports(a=3)

    def test_problems_come_when_they_change_and_go_when_mended(self, tmp_path: Path) -> None:
        with watching(tmp_path) as watched:
            (tmp_path / "a.yaml").write_text(service("a", 0))
            watched.until(lambda: len(watched.problems) == 1)
            (tmp_path / "a.yaml").write_text(service("a", 1))
            watched.until(lambda: watched.problems == ())
            watched.until_ports(a=1)

    def test_a_directory_that_is_replaced_by_another_is_watched_too(self, tmp_path: Path) -> None:
        directory = tmp_path / "manifests"
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
        directory.symlink_to("one")
        with watching(directory) as watched:
            (tmp_path / "link").symlink_to("two")
            (tmp_path / "link").rename(directory)
            (tmp_path / "two" / "a.yaml").write_text(service("a", 1))
            watched.until_ports(a=1)
            (tmp_path / "two" / "a.yaml").write_text(service("a", 2))
            watched.until_ports(a=2)

    def test_what_no_one_tells_about_is_found_by_the_slow_look(self, tmp_path: Path) -> None:
        elsewhere, directory = tmp_path / "elsewhere.yaml", tmp_path / "manifests"
        directory.mkdir()
        elsewhere.write_text(service("a", 1))
        (directory / "a.yaml").symlink_to(elsewhere)
        with watching(directory, rescan=0.3) as watched:
            watched.until_ports(a=1)
            elsewhere.write_text(service("a", 2))
            watched.until_ports(a=2)

    def test_a_burst_is_one_change(self, tmp_path: Path) -> None:
        with watching(tmp_path) as watched:
            for i in range(30):
                (tmp_path / f"{i}.yaml").write_text(service(f"s{i}", i + 1))
            watched.until(lambda: len(watched.state) == 30)
            assert len(watched.changes) < 10

    def test_files_that_vanish_while_read_do_no_harm(self, tmp_path: Path) -> None:
        (tmp_path / "keep.yaml").write_text(service("keep", 1))
        with watching(tmp_path) as watched:
            for i in range(200):
                (tmp_path / "gone.yaml").write_text(service("gone", i + 1))
                (tmp_path / "gone.yaml").unlink()
            (tmp_path / "last.yaml").write_text(service("last", 2))
            watched.until_ports(keep=1, last=2)
            assert watched.problems == ()


@pytest.fixture
def other_file_system(tmp_path: Path) -> Iterator[Path]:
    """An empty directory on another file system than `tmp_path`."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


class TestDirectoryThatGoesAway:
    """Missing says nothing about the objects: an unmounted directory deletes no Service."""

    def test_missing_at_first_is_a_problem_and_no_state_until_it_comes(
        self, tmp_path: Path
    ) -> None:
        directory = tmp_path / "manifests"
        with watching(directory) as watched:
            watched.until(lambda: bool(watched.problems))
            assert [(p.message, p.where) for p in watched.problems] == [
                ("the directory of manifests is missing", str(directory))
            ]
            assert watched.stays(lambda: not watched.listed)
            directory.mkdir()
            (directory / "a.yaml").write_text(service("a", 1))
            watched.until_ports(a=1)
            watched.until(lambda: watched.problems == ())
            assert isinstance(watched.first, Problems)
            assert watched.listed == 1

    def test_an_empty_one_that_comes_later_is_a_state(self, tmp_path: Path) -> None:
        with watching(tmp_path / "manifests") as watched:
            (tmp_path / "manifests").mkdir()
            watched.until(lambda: watched.listed == 1)
            assert watched.state == {}

    def test_unreadable_at_first_is_no_state_either(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.yaml").write_text(service("a", 1))
        with monkeypatch.context() as patched:
            refuse_to_list(patched, tmp_path)
            with watching(tmp_path, rescan=0.3) as watched:
                watched.until(lambda: bool(watched.problems))
                assert watched.problems[0].message == "cannot be read: Permission denied"
                assert watched.stays(lambda: not watched.listed)
                patched.undo()
                watched.until_ports(a=1)
                watched.until(lambda: watched.problems == ())

    def test_removed_while_running_deletes_nothing_and_is_a_problem(self, tmp_path: Path) -> None:
        directory = tmp_path / "manifests"
        manifests(directory, a=1, b=2)
        with watching(directory) as watched:
            watched.until_ports(a=1, b=2)
            directory.rename(tmp_path / "elsewhere")  # in one step, as umount does it
            watched.until(lambda: bool(watched.problems))
            assert "missing" in watched.problems[0].message
            assert watched.stays(lambda: not watched.changes)

    def test_made_again_its_files_are_in_force_and_what_is_gone_is_deleted(
        self, tmp_path: Path
    ) -> None:
        directory = tmp_path / "manifests"
        manifests(directory, a=1, b=2)
        with watching(directory) as watched:
            watched.until_ports(a=1, b=2)
            directory.rename(tmp_path / "elsewhere")
            watched.until(lambda: bool(watched.problems))
            manifests(tmp_path / "new", b=3, c=4)
            (tmp_path / "new").rename(directory)
            watched.until_ports(b=3, c=4)
            watched.until(lambda: watched.problems == ())
            assert [change.deleted for change in watched.changes] == [(ref("a"),)]
            assert watched.listed == 1

    def test_made_again_it_is_watched_again(self, tmp_path: Path) -> None:
        directory = tmp_path / "manifests"
        manifests(directory, a=1)
        with watching(directory) as watched:
            for port in (1, 2):
                watched.until_ports(a=port)
                shutil.rmtree(directory)
                watched.until(lambda: bool(watched.problems))
                manifests(directory, a=port + 10)
                watched.until_ports(a=port + 10)
                manifests(directory, a=port + 1)

    def test_put_back_as_it_was_changes_nothing(self, tmp_path: Path) -> None:
        directory = tmp_path / "manifests"
        manifests(directory, a=1)
        with watching(directory) as watched:
            watched.until_ports(a=1)
            directory.rename(tmp_path / "elsewhere")
            watched.until(lambda: bool(watched.problems))
            (tmp_path / "elsewhere").rename(directory)
            watched.until(lambda: watched.problems == ())
            assert watched.stays(lambda: not watched.changes)

    def test_deleting_its_files_but_not_itself_deletes_the_objects(self, tmp_path: Path) -> None:
        manifests(tmp_path, a=1)
        with watching(tmp_path) as watched:
            watched.until_ports(a=1)
            (tmp_path / "a.yaml").unlink()
            watched.until_ports()
            assert watched.problems == ()

    def test_an_empty_one_of_another_file_system_deletes_nothing(
        self, tmp_path: Path, other_file_system: Path
    ) -> None:
        directory = tmp_path / "manifests"
        manifests(other_file_system, a=1)
        (tmp_path / "below").mkdir()
        directory.symlink_to(other_file_system)  # as if mounted over an empty directory
        source = ManifestSource(directory)
        assert look(source) == ({"a": 1}, [])
        directory.unlink()
        directory.symlink_to("below")
        for _ in range(2):
            found, (problem,) = look(source)
            assert found == {"a": 1}
            assert "unmounted" in problem.message
        manifests(directory, b=2)
        assert look(source) == ({"b": 2}, [])
        (directory / "b.yaml").unlink()
        assert look(source) == ({}, [])

    def test_read_gives_no_objects_and_the_problem(self, tmp_path: Path) -> None:
        listed, problems = ManifestSource(tmp_path / "manifests").read()
        assert listed == Listed(())
        assert [problem.message for problem in problems.problems] == [
            "the directory of manifests is missing"
        ]

    def test_read_keeps_the_last_state(self, tmp_path: Path) -> None:
        manifests(tmp_path / "manifests", a=1)
        source = ManifestSource(tmp_path / "manifests")
        look(source)
        shutil.rmtree(tmp_path / "manifests")
        assert look(source)[0] == {"a": 1}

    @pytest.mark.parametrize("moment", ["listing", "opening"])
    def test_going_away_in_the_middle_of_a_look_deletes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        directory = tmp_path / "manifests"
        manifests(directory, a=1, b=2)
        source = ManifestSource(directory)
        look(source)
        manifests(directory, a=3)
        scandir, opened = os.scandir, Path.open

        def go_away() -> None:
            if directory.exists():
                directory.rename(tmp_path / "elsewhere")

        def list_and_go(path: str) -> object:
            entries = scandir(path)
            go_away()
            return entries

        def go_and_open(self: Path, mode: str) -> object:
            go_away()
            return opened(self, mode)

        if moment == "listing":
            monkeypatch.setattr(os, "scandir", list_and_go)
        else:
            monkeypatch.setattr(Path, "open", go_and_open)
        assert look(source)[0] == {"a": 1, "b": 2}
        found, (problem,) = look(source)
        assert found == {"a": 1, "b": 2}
        assert "missing" in problem.message


def test_only_changed_files_are_parsed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(service(name))
        os.utime(tmp_path / f"{name}.yaml", (1e9, 1e9))
    source = ManifestSource(tmp_path)
    source.read()
    opened: list[str] = []
    real = Path.open

    def spy(self: Path, mode: str) -> object:
        opened.append(self.name)
        return real(self, mode)

    monkeypatch.setattr(Path, "open", spy)
    (tmp_path / "b.yaml").write_bytes(service("b", 2).encode())
    opened.clear()
    assert look(source)[0] == {"a": 80, "b": 2}
    assert opened == ["b.yaml"]


class TestRestart:
    """What was in force before a restart stays in force when its file is bad by then."""

    GOOD = "apiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n"

    def _first_run(self, directory: Path, memory: Path) -> None:
        stop = threading.Event()
        source = ManifestSource(directory, memory, quiet=0.01)
        source.run(lambda _: stop.set(), stop)
        assert memory.exists()

    @pytest.mark.parametrize(
        "bad",
        [
            pytest.param("{ this is no YAML", id="unreadable-file"),
            pytest.param(GOOD.replace("port: 80", "port: 99999"), id="bad-object"),
        ],
    )
    def test_the_last_good_version_outlives_the_process(self, tmp_path: Path, bad: str) -> None:
        directory, memory = tmp_path / "m", tmp_path / "memory.json"
        directory.mkdir()
        (directory / "web.yaml").write_text(self.GOOD)
        self._first_run(directory, memory)
        (directory / "web.yaml").write_text(bad)
        listed, problems = ManifestSource(directory, memory).read()
        assert [obj.ref.name for obj in listed.objects] == ["web"]
        assert problems.problems

    def test_objects_of_no_namespace_are_kept_as_well(self, tmp_path: Path) -> None:
        directory, memory = tmp_path / "m", tmp_path / "memory.json"
        directory.mkdir()
        good = "".join(
            f"{{apiVersion: v1, kind: {kind}, metadata: {{name: a}}}}\n---\n"
            for kind in ("Node", "Namespace")
        )
        (directory / "cluster.yaml").write_text(good)
        self._first_run(directory, memory)
        (directory / "cluster.yaml").write_text("{ this is no YAML")
        listed, _ = ManifestSource(directory, memory).read()
        assert {obj.ref for obj in listed.objects} == {
            Ref("Node", "", "a"),
            Ref("Namespace", "", "a"),
        }

    def test_an_unmounted_directory_takes_nothing_away(self, tmp_path: Path) -> None:
        """What it was mounted on comes to light, empty: while no agent looked, too."""
        directory, memory = tmp_path / "m", tmp_path / "memory.json"
        directory.mkdir()
        (directory / "web.yaml").write_text(self.GOOD)
        self._first_run(directory, memory)
        (directory / "web.yaml").unlink()
        saved = json.loads(memory.read_text())
        assert saved["device"] == directory.stat().st_dev
        memory.write_text(json.dumps({**saved, "device": saved["device"] + 1}))

        got: list[Event] = []
        stop = threading.Event()

        def put(event: Event) -> None:
            got.append(event)
            stop.set()

        ManifestSource(directory, memory, quiet=0.01).run(put, stop)
        assert not [event for event in got if isinstance(event, Listed)]
        [problem] = [p for e in got if isinstance(e, Problems) for p in e.problems]
        assert "unmounted" in problem.message and str(memory) in problem.mend

    def test_what_was_deleted_meanwhile_is_gone(self, tmp_path: Path) -> None:
        directory, memory = tmp_path / "m", tmp_path / "memory.json"
        directory.mkdir()
        (directory / "web.yaml").write_text(self.GOOD)
        self._first_run(directory, memory)
        (directory / "web.yaml").unlink()
        listed, problems = ManifestSource(directory, memory).read()
        assert not listed.objects and not problems.problems

    def test_a_memory_that_makes_no_sense_is_no_memory(self, tmp_path: Path) -> None:
        directory, memory = tmp_path / "m", tmp_path / "memory.json"
        directory.mkdir()
        memory.write_text('{"services": 1}')
        assert ManifestSource(directory, memory).read()[0].objects == ()
