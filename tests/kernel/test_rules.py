"""Each rule of the data path is needed: without it, the test that names it fails.

The programs are compiled with one rule taken out, and a check that passes with the rule must fail.
Rules against races are in test_races.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import test_affinity as affinity
from tests.kernel import test_counts as counts
from tests.kernel import test_rebalance as rebalance
from tests.kernel import test_sockets as sockets
from tests.support.kernel import Lab, until

pytestmark = pytest.mark.kernel

Check = Callable[[Lab], None]
Change = tuple[str, str, str]

RULES = [
    pytest.param(
        (
            "sock.c",
            "if (find_record(cookie, bucket, first, &found)) {",
            "if (find_record(~cookie, bucket, first, &found)) {",
        ),
        counts.test_a_udp_socket_that_connects_again_moves_its_count,
        id="a-socket-looks-for-its-own-record-before-it-claims-a-place",
    ),
    pytest.param(
        ("sock.c", "if (error == NOT_A_SERVICE)\n", "if (0)\n"),
        counts.test_after_af_unspec_a_direct_connect_shows_the_real_peer,
        id="a-direct-connect-clears-the-record",
    ),
    pytest.param(
        ("sock.c", "if (error == NOT_A_SERVICE)\n", "if (1)\n"),
        counts.test_a_refused_second_connect_leaves_the_first_peer_as_it_is,
        id="a-refused-connect-keeps-the-record",
    ),
    pytest.param(
        ("sock.c", "if (!same_address(found.record->peer, peer->addr) ||", "if (0 &&"),
        counts.test_a_second_connect_that_fails_on_its_way_shows_no_vip_that_it_never_reached,
        id="getpeername-translates-only-the-real-peer",
    ),
    pytest.param(
        ("sock.c", "to == BPF_TCP_CLOSE && destroyed.lookup(&cookie)", "0"),
        rebalance.test_what_is_ended_is_no_failure_of_its_endpoint,
        id="what-the-agent-ends-is-no-failure",
    ),
    pytest.param(
        ("record.h", "if (vip->proto == IPPROTO_UDP)\n", ""),
        counts.test_a_connect_that_fails_on_its_way_never_counts,
        id="tcp-counts-with-its-syn",
    ),
    pytest.param(
        ("sock.c", "case BPF_SOCK_OPS_STATE_CB:\n", "case 999:\n"),
        counts.test_a_refused_connect_counts_no_longer_than_the_refusal,
        id="tcp-close-ends-the-count",
    ),
    pytest.param(
        ("sock.c", "\tfree_record(cookie, bucket_of(cookie));\n\tforget", "\tforget"),
        counts.test_a_udp_socket_that_connects_again_moves_its_count,
        id="release-ends-the-count-of-the-rest",
    ),
    pytest.param(
        (
            "record.h",
            "if (!found.cookie) {\n\t\tfree_overflow(cookie, bucket);",
            "if (!found.cookie) {",
        ),
        counts.test_a_full_bucket_overflows_and_a_full_overflow_goes_on_unrecorded,
        id="overflow-records-are-freed",
    ),
    pytest.param(
        ("record.h", "if ((__s32)*taken >= MAX_OVERFLOW / 4)", "if (0)"),
        counts.test_a_full_bucket_overflows_and_a_full_overflow_goes_on_unrecorded,
        id="overflow-is-bounded-for-each-namespace",
    ),
    pytest.param(
        (
            "record.h",
            "\tif (load_of && load_of->generation == record->generation)\n"
            "\t\t__sync_fetch_and_add(&load_of->open, -1);",
            "\tif (load_of)\n\t\t__sync_fetch_and_add(&load_of->open, -1);",
        ),
        counts.test_a_connection_that_outlives_its_endpoint_leaves_the_next_one_with_its_id_alone,
        id="records-hold-the-generation",
    ),
    pytest.param(
        ("sock.c", " ||\n\t\t    !is_of_record(ctx, found.record))", ")"),
        counts.test_a_record_left_by_a_connect_that_never_went_out_counts_for_nobody,
        id="a-connection-is-counted-for-its-own-record",
    ),
    pytest.param(
        ("sock.c", "record_mptcp(ctx, &vip, slot);", ""),
        counts.test_mptcp_counts_once_and_its_peer_is_the_vip,
        id="mptcp-sockets-are-found-by-their-address",
    ),
    pytest.param(
        (
            "datagram.h",
            "if (!load_of || load_of->generation != choice->generation)",
            "if (!load_of)",
        ),
        sockets.TestUnconnectedUDP().test_an_endpoint_that_left_is_replaced_though_its_slot_is_used_again,
        id="a-datagram-choice-holds-the-generation",
    ),
    pytest.param(
        (
            "datagram.h",
            "if (!(set >> 32) || !find_member(set, choice->peer, choice->peer_port))",
            "if (!(set >> 32))",
        ),
        sockets.TestUnconnectedUDP().test_an_endpoint_that_left_this_set_alone_is_replaced,
        id="a-datagram-choice-is-a-member-of-the-set",
    ),
    pytest.param(
        (
            "datagram.h",
            " || service->owner != choice->owner ||",
            " ||",
        ),
        sockets.TestUnconnectedUDP().test_a_vip_that_changes_hands_takes_its_sockets_along,
        id="a-datagram-choice-holds-the-owner",
    ),
    pytest.param(
        (
            "affinity.h",
            "slot = find_member(to->set, copy.addr, copy.port);",
            "slot = pick(to->set, 0);",
        ),
        affinity.test_a_client_keeps_its_endpoint_while_others_come_and_go,
        id="affinity-is-to-an-endpoint-not-to-a-place",
    ),
    pytest.param(
        ("affinity.h", "key.netns = bpf_get_netns_cookie(ctx);", "key.netns = 1;"),
        affinity.test_each_pod_is_a_client_of_its_own,
        id="affinity-is-a-pods-own",
    ),
    pytest.param(
        ("affinity.h", "if (stale)\n\t\t\trandom = mix(stale ^ key.netns);", ""),
        affinity.test_the_successor_of_an_endpoint_that_left_follows_from_the_entry_it_replaces,
        id="a-successor-follows-from-what-it-replaces",
    ),
    pytest.param(
        ("affinity.h", "*(volatile __u64 *)&entry->seen = now;", ""),
        affinity.test_each_new_connection_starts_the_time_again,
        id="a-new-connection-refreshes-affinity",
    ),
]


@pytest.mark.parametrize(("change", "check"), RULES)
def test_without_the_rule_its_test_fails(
    change: Change,
    check: Check,
    fresh_lab: Callable[..., Lab],
    changed_source: Callable[..., Path],
) -> None:
    lab = fresh_lab(source=changed_source(change))
    # What would come in the end, with the rule, is not waited for here.
    with pytest.MonkeyPatch.context() as patch, pytest.raises((AssertionError, OSError)):
        patch.setattr(counts, "until", lambda condition, what, **_: _now(condition, what))
        check(lab)


def _now(condition: Callable[[], object], what: str) -> None:
    try:
        until(condition, what, seconds=0.3)
    except AssertionError:
        raise AssertionError(what) from None
