"""What keeping the maps in step costs: full sync, one change, restart, memory."""

from __future__ import annotations

BENCHES: dict = {}
