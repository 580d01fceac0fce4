"""Options of a backup: words, numbers, and the sizes that follow from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from blocklayer.base.errors import OptionError
from blocklayer.base.units import KIB, MIB
from blocklayer.jobs.backup_options import (
    BackupOptions,
    BackupRequest,
    ClusterChoice,
    SyncMode,
    choose_chunk,
    choose_cluster,
)
from blocklayer.jobs.policy import OnError
from tests.helpers.scripted import disk, scripted_graph
from tests.helpers.virtual_time import virtual_time

if TYPE_CHECKING:
    from collections.abc import Mapping


@virtual_time
async def test_a_request_is_built_from_words_and_sizes() -> None:
    async with scripted_graph() as graph:
        node = await disk(graph, "disk", MIB)
        request = BackupRequest.build(node, "x.qcow2", sync="top", speed="10M", on_source_error="stop")
        assert (request.source, request.target) == (node, "x.qcow2")
        assert request.options == BackupOptions(sync=SyncMode.TOP, speed=10 * MIB, on_source_error=OnError.STOP)
        for wrong in ({"sync": "half"}, {"sped": 1}, {"retry": "often"}):
            options: Mapping[str, object] = wrong
            with pytest.raises(OptionError):
                BackupRequest.build(node, "x.qcow2", **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"speed": -1}, "non-negative"),
        ({"max_workers": 0}, "between 1 and 2147483647"),
        ({"max_workers": 2**31}, "between 1 and 2147483647"),
        ({"max_chunk": -1}, "zero .* or positive"),
        ({"min_cluster_size": 3}, "power of two"),
        ({"min_cluster_size": 1 << 40}, "at most"),
        ({"retry": -1}, "retry"),
        ({"cbw_timeout": -0.5}, "cbw-timeout"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, int], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        BackupOptions(**options).check_numbers()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "minimum", "cluster"),
    [(None, 0, 64 * KIB), (4 * KIB, 0, 64 * KIB), (MIB, 0, MIB), (128 * KIB, 256 * KIB, 256 * KIB), (MIB, 4096, MIB)],
)
def test_the_cluster_is_the_largest_of_three(target: int | None, minimum: int, cluster: int) -> None:
    assert choose_cluster(target, tells=True, min_cluster_size=minimum) == ClusterChoice(cluster)


def test_a_target_that_should_tell_its_cluster_and_does_not_is_warned_about() -> None:
    assert "unusable" in choose_cluster(None, tells=False, min_cluster_size=0).warnings[0]


def test_chunks_are_whole_clusters() -> None:
    assert choose_chunk(0, 64 * KIB) == MIB
    assert choose_chunk(0, 4 * MIB) == 4 * MIB
    assert choose_chunk(200 * KIB, 64 * KIB) == 192 * KIB
    assert choose_chunk(64 * KIB, 64 * KIB) == 64 * KIB
    with pytest.raises(OptionError, match=r"max-chunk \(65535\) is less than backup cluster size \(65536\)"):
        choose_chunk(65535, 65536)
