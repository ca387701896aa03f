"""The property of tests/unit/test_plan.py, shorter, on maps of the kernel."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support.kernel import Lab
from tests.support.plans import Harness, events, play
from tests.support.stepped import SteppedMaps

pytestmark = pytest.mark.kernel


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(events)
def test_at_every_step_the_kernels_maps_hold_a_set_that_was_or_is_right(
    lab: Lab, sequence: list
) -> None:
    lab.clear()
    try:
        play(Harness(SteppedMaps(lab.maps)), sequence, everything_fits=True)
    finally:
        lab.adopt()
