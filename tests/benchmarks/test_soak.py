"""The soak test of ``benchmarks/soak.py``, for seconds instead of minutes; it detects a leak."""

from typing import Any

import pytest

from benchmarks import soak


def test_sessions_leave_nothing_open() -> None:
    result = soak.soak(0.0, ["digits", "tiny-unet"], session_seconds=0.3)
    assert result["sessions"] == 9
    assert (
        result["left_open"] == {"files": 0, "threads": 0, "children": 0}
        or max(result["left_open"].values()) < 0
    )
    assert result["resident_late_bytes"] - result["resident_early_bytes"] < 100 * 2**20


@pytest.mark.slow
def test_a_leak_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []

    def leaky(*arguments: Any) -> int:
        kept.append((open("/dev/null"), bytearray(b"x") * (20 * 2**20)))  # noqa: SIM115
        return 0

    monkeypatch.setattr(soak, "session", leaky)
    result = soak.soak(0.0, ["digits"], session_seconds=0.0)
    assert result["left_open"]["files"] > 0 and not result["flat"]
    assert result["resident_late_bytes"] - result["resident_early_bytes"] > soak.GROWTH
    for file, _ in kept:
        file.close()
