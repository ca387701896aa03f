"""What the programs cost the verifier, which other kernels may count otherwise."""

from __future__ import annotations

import pytest

from pointsman import bpf
from tests.kernel.packets.node import EGRESS, INGRESS, XDP, Node

#: The kernel takes a million instructions (BPF_COMPLEXITY_LIMIT_INSNS).
ROOM = 800_000


@pytest.mark.parametrize("hook", [XDP, INGRESS, EGRESS])
def test_the_verifier_has_room_to_spare(node: Node, hook: str) -> None:
    assert bpf.program_info(node.lab.program(hook)).verified < ROOM
