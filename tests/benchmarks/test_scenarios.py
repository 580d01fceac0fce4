"""Each scenario, run once on small disks: both sides do their work and every figure is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import backup_sparse, guest_writes, harness, loops, peak_memory
from benchmarks.__main__ import SCENARIOS
from benchmarks.harness import Settings, run_scenario
from benchmarks.images import MIB
from tests.helpers.peers import needs

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.harness import Scenario

PROGRAMS = ("qemu-img", "qemu-io", "qemu-storage-daemon", "fio")

pytestmark = needs(*PROGRAMS)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "settle", lambda _size: None)
    monkeypatch.setattr(backup_sparse, "VIRTUAL_SIZE", 1 << 30)
    monkeypatch.setattr(peak_memory, "SPARSE_SIZE", 1 << 30)
    monkeypatch.setattr(guest_writes, "WARM_UP_S", 0.5)
    monkeypatch.setattr(guest_writes, "PACED_S", 1)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_scenario_measures_both_sides_and_leaves_nothing_behind(scenario: Scenario, tmp_path: Path) -> None:
    settings = Settings(tmp_path, rounds=1, size=8 * MIB, requests=256, engine="threads", loops=loops.available()[-1:])
    results = list(run_scenario(scenario, settings))
    assert results
    assert [result.case for result in results if result.ratio is None and "full" not in result.case] == []
    assert list(tmp_path.iterdir()) == []
