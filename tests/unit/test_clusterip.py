"""Who gets which ClusterIP, and who keeps it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointsman.clusterip import ClusterIPs
from pointsman.objects import Ref, Service

V4, V6 = "10.96.0.0/24", "fd00:96::/112"


def service(name: str, ip: str = "", created: str | None = None, **spec: Any) -> Service:
    document = {"metadata": {"name": name}, "spec": {"clusterIP": ip} | spec}
    if created:
        document["metadata"]["creationTimestamp"] = f"{created}T00:00:00Z"
    return msgspec.convert(document, Service)


def ips(*cidrs: str, **claims: Ref) -> ClusterIPs:
    return ClusterIPs(cidrs or (V4,), claims)


def test_a_service_without_address_gets_one_of_the_cidr() -> None:
    assigned, problems = ips().assign(service("a"))
    assert problems == []
    assert assigned.spec.cluster_ip.startswith("10.96.0.")
    assert assigned.spec.cluster_ips == (assigned.spec.cluster_ip,)
    assert assigned.spec.ip_families == ("IPv4",)


def test_the_same_name_gets_the_same_address_in_a_new_process() -> None:
    # Python's own hash() differs from process to process; this one is for ever.
    assert ips("10.96.0.0/16").assign(service("web"))[0].spec.cluster_ip == "10.96.188.77"


def test_claims_outlive_a_restart_whatever_the_order() -> None:
    services = [service(f"s{i}") for i in range(200)]
    first = ips()
    before, _ = first.assign_all(services)
    second = ClusterIPs([V4], first.claims)
    after, _ = second.assign_all(services[::-1])
    assert after[::-1] == before
    assert second.claims == first.claims


def test_an_address_once_allocated_is_kept_though_the_name_points_elsewhere() -> None:
    pool = ClusterIPs([V4], {"10.96.0.99": Ref("Service", "default", "a")})
    assert ips().assign(service("a"))[0].spec.cluster_ip != "10.96.0.99"
    assert pool.assign(service("a"))[0].spec.cluster_ip == "10.96.0.99"


def test_addresses_of_the_network_and_of_custom_are_not_allocated() -> None:
    pool = ips("10.96.0.0/28")
    assigned = [pool.assign(service(f"s{i}"))[0].spec.cluster_ip for i in range(12)]
    assert sorted(int(ip.rpartition(".")[2]) for ip in assigned) == [
        *range(2, 10),
        *range(11, 15),
    ]
    assert pool.assign(service("dns", "10.96.0.10"))[0].spec.cluster_ip == "10.96.0.10"


def test_a_full_cidr_is_named_and_the_one_left_out_gets_the_first_address_free() -> None:
    pool = ips("10.96.0.0/30")
    pool.assign(service("a"))
    left, (problem,) = pool.assign(service("b"))
    assert left.spec.cluster_ip == ""
    assert "10.96.0.0/30" in problem.message
    assert problem.object == "Service default/b"
    assert pool.assign(service("x", "192.0.2.1"))[1] == []
    pool.release(service("a").ref)
    assert pool.due() == (left.ref,)
    assert pool.assign(service("b"))[0].spec.cluster_ip == "10.96.0.2"


def test_of_two_claims_the_owner_keeps_it_and_the_other_is_told() -> None:
    pool = ips()
    pool.assign(service("a", "10.96.0.77"))
    loser, (problem,) = pool.assign(service("b", "10.96.0.77"))
    assert (loser.spec.cluster_ip, loser.spec.cluster_ips) == ("", ())
    assert problem.field == "spec.clusterIP"
    assert "default/a" in problem.message
    assert "default/b" in problem.message


@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(lambda pool: pool.release(service("a").ref), id="is-deleted"),
        pytest.param(lambda pool: pool.assign(service("a", "10.96.0.78")), id="moves"),
        pytest.param(lambda pool: pool.assign(service("a", "None")), id="becomes-headless"),
        pytest.param(
            lambda pool: pool.assign(service("a", type="ExternalName")), id="becomes-external"
        ),
    ],
)
def test_the_loser_gets_the_address_when_the_owner(leave: Any) -> None:
    pool = ips()
    pool.assign(service("a", "10.96.0.77"))
    pool.assign(service("b", "10.96.0.77"))
    assert pool.due() == ()
    leave(pool)
    assert pool.due() == (service("b").ref,)
    assert pool.assign(service("b", "10.96.0.77"))[0].spec.cluster_ip == "10.96.0.77"


def test_in_the_first_list_the_older_gets_it() -> None:
    listed = [
        service("undated", "10.96.0.5"),
        service("young", "10.96.0.5", "2026-02-02"),
        service("old", "10.96.0.5", "2026-01-01"),
    ]
    pool = ips()
    pool.assign_all(listed)
    assert pool.claims == {"10.96.0.5": listed[2].ref}


def test_without_timestamps_the_first_of_the_list_gets_it() -> None:
    pool = ips()
    assigned, problems = pool.assign_all([service("b", "10.96.0.5"), service("a", "10.96.0.5")])
    assert [s.spec.cluster_ip for s in assigned] == ["10.96.0.5", ""]
    assert [p.object for p in problems] == ["Service default/a"]


def test_a_claim_is_worth_more_than_age() -> None:
    pool = ClusterIPs([V4], {"10.96.0.5": Ref("Service", "default", "young")})
    pool.assign_all([service("old", "10.96.0.5", "2020-01-01"), service("young", "10.96.0.5")])
    assert pool.claims["10.96.0.5"].name == "young"


def test_a_claim_of_a_service_that_went_while_we_were_down_is_void() -> None:
    pool = ClusterIPs([V4], {"10.96.0.5": Ref("Service", "default", "gone")})
    (assigned,), problems = pool.assign_all([service("a", "10.96.0.5")])
    assert (assigned.spec.cluster_ip, problems) == ("10.96.0.5", [])


def test_an_owner_that_moved_while_we_were_down_leaves_its_address_to_the_other() -> None:
    pool = ClusterIPs([V4], {"10.96.0.5": Ref("Service", "default", "b")})
    assigned, problems = pool.assign_all([service("a", "10.96.0.5"), service("b", "10.96.0.6")])
    assert ([s.spec.cluster_ip for s in assigned], problems) == (["10.96.0.5", "10.96.0.6"], [])


def test_in_the_first_list_asked_for_goes_before_allocated() -> None:
    automatic = ips().assign(service("a"))[0].spec.cluster_ip
    assigned, problems = ips().assign_all([service("a"), service("b", automatic)])
    assert problems == []
    assert assigned[1].spec.cluster_ip == automatic


def test_later_an_allocated_address_is_kept_by_who_has_it() -> None:
    pool = ips()
    has = pool.assign(service("a"))[0].spec.cluster_ip
    assert pool.assign(service("b", has))[0].spec.cluster_ip == ""
    assert pool.assign(service("a"))[0].spec.cluster_ip == has


def test_an_allocated_address_outside_of_a_changed_cidr_is_replaced() -> None:
    first = ips("10.1.0.0/24")
    first.assign(service("a"))
    assigned, _ = ClusterIPs([V4], first.claims).assign(service("a"))
    assert assigned.spec.cluster_ip.startswith("10.96.0.")


@pytest.mark.parametrize(
    ("spec", "families"),
    [
        pytest.param({}, ["IPv4"], id="the-first-cidr-is-the-default"),
        pytest.param({"ipFamilies": ["IPv6"]}, ["IPv6"], id="ip-families-pick"),
        pytest.param({"ipFamilies": ["IPv6", "IPv4"]}, ["IPv6", "IPv4"], id="in-their-order"),
        pytest.param({"ipFamilyPolicy": "PreferDualStack"}, ["IPv4", "IPv6"], id="prefer-dual"),
        pytest.param({"ipFamilyPolicy": "RequireDualStack"}, ["IPv4", "IPv6"], id="require-dual"),
        pytest.param(
            {"ipFamilyPolicy": "PreferDualStack", "clusterIP": "fd00::5"},
            ["IPv6", "IPv4"],
            id="the-other-family-of-an-address-asked-for",
        ),
    ],
)
def test_families(spec: dict[str, Any], families: list[str]) -> None:
    assigned, problems = ips(V4, V6).assign(
        service("a", **{"ip": spec.pop("clusterIP", "")}, **spec)
    )
    assert problems == []
    assert list(assigned.spec.ip_families) == families
    assert ["IPv6" if ":" in ip else "IPv4" for ip in assigned.spec.cluster_ips] == families


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        pytest.param({"ipFamilyPolicy": "RequireDualStack"}, "spec.ipFamilyPolicy", id="require"),
        pytest.param({"ipFamilies": ["IPv6"]}, "spec.ipFamilies", id="ip-families"),
    ],
)
def test_a_family_without_cidr_is_a_problem(spec: dict[str, Any], field: str) -> None:
    assigned, (problem,) = ips().assign(service("a", **spec))
    assert assigned.spec.cluster_ip == ""
    assert problem.field == field
    assert "IPv6" in problem.message


def test_prefer_dual_stack_is_content_with_one_family() -> None:
    assigned, problems = ips().assign(service("a", ipFamilyPolicy="PreferDualStack"))
    assert (len(assigned.spec.cluster_ips), problems) == (1, [])


@pytest.mark.parametrize(
    "one",
    [service("a", "None"), service("a", type="ExternalName", externalName="x.y")],
    ids=["headless", "external-name"],
)
def test_passes_through_untouched(one: Service) -> None:
    assert ips().assign(one) == (one, [])


@pytest.mark.parametrize(
    "cidrs",
    [["10.0.0.0/33"], ["10.0.0.1/24"], [V4, "10.97.0.0/24"]],
    ids=["no-cidr", "host-bits", "one-family-twice"],
)
def test_refuses_cidrs(cidrs: list[str]) -> None:
    with pytest.raises(ValueError, match="10"):
        ClusterIPs(cidrs, {})


def test_a_full_16_bit_cidr_is_found_full_and_every_address_used_once() -> None:
    pool = ips("10.96.0.0/20")
    got = [pool.assign(service(f"s{i}"))[0].spec.cluster_ip for i in range(4100)]
    assert len(set(got) - {""}) == 4092
    assert got.count("") == 8


_NAMES = st.sampled_from("abcdef")
_IPS = st.sampled_from(["", "", "None", "10.96.0.2", "10.96.0.3", "10.96.0.9", "192.0.2.1"])


@given(st.lists(st.tuples(_NAMES, st.one_of(st.none(), _IPS)), max_size=40))
def test_an_address_never_has_two_owners_and_all_get_what_is_free(
    steps: list[tuple[str, str | None]],
) -> None:
    pool = ips("10.96.0.0/29")  # four addresses to allocate
    specs: dict[Ref, Service] = {}
    now: dict[Ref, Service] = {}
    for name, ip in steps:
        one = service(name, ip or "")
        if ip is None:
            pool.release(one.ref)
            specs.pop(one.ref, None)
            now.pop(one.ref, None)
        else:
            specs[one.ref] = one
            now[one.ref] = pool.assign(one)[0]
        while due := pool.due():
            for ref in due:
                now[ref] = pool.assign(specs[ref])[0]
        used = [ip for s in now.values() for ip in s.spec.cluster_ips if ip != "None"]
        assert sorted(used) == sorted(pool.claims)
        for ref, one in now.items():
            if not one.spec.cluster_ip:
                wanted = specs[ref].spec.cluster_ip
                inside = {f"10.96.0.{n}" for n in range(2, 7)}
                assert wanted in pool.claims or (not wanted and inside <= pool.claims.keys())
