"""How long the loader may take."""

from __future__ import annotations

import pytest

from pointsman import errors, loading


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seen: list[float] = []

    def run(_request: object, timeout: float) -> tuple[dict[str, object], list[str]]:
        seen.append(timeout)
        return {"features": []}, []

    monkeypatch.setattr(loading, "_run", run)
    monkeypatch.delenv("POINTSMAN_LOAD_TIMEOUT", raising=False)
    return seen


def test_a_loader_has_two_minutes(given: list[float]) -> None:
    loading.load(loading.PACKETS, {})
    assert given == [120]


def test_the_environment_gives_it_more(given: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTSMAN_LOAD_TIMEOUT", "600")
    loading.load(loading.PACKETS, {})
    assert given == [600]


@pytest.mark.parametrize("text", ["", "soon", "0", "-1", "nan", "inf"])
def test_what_is_no_time_is_refused_by_name(
    given: list[float], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("POINTSMAN_LOAD_TIMEOUT", text)
    with pytest.raises(errors.PointsmanError, match=r"POINTSMAN_LOAD_TIMEOUT: .* write e\.g\. 600"):
        loading.load(loading.PACKETS, {})
    assert not given
