"""The survey turns extents that end anywhere into runs of whole clusters."""

from __future__ import annotations

from random import Random

import pytest

from blocklayer.base.units import KIB, SECTOR
from blocklayer.jobs.survey import Content, Run, Survey
from tests.helpers.scripted import disk, scripted, scripted_graph
from tests.helpers.virtual_time import virtual_time

CLUSTER = 64 * KIB


@virtual_time
async def test_a_cluster_that_is_not_all_one_thing_is_data() -> None:
    async with scripted_graph() as graph:
        node = await disk(graph, "disk", 8 * CLUSTER)
        scripted(node).put(3 * CLUSTER + SECTOR, b"d" * SECTOR)
        survey = Survey(node, CLUSTER, top_only=False)
        assert await survey.run_at(0, node.size) == Run(0, 3 * CLUSTER, Content.ZERO)
        assert await survey.run_at(3 * CLUSTER, node.size) == Run(3 * CLUSTER, 4 * CLUSTER, Content.DATA)
        assert await survey.run_at(4 * CLUSTER, node.size) == Run(4 * CLUSTER, 8 * CLUSTER, Content.ZERO)


@virtual_time
async def test_the_last_cluster_may_be_short() -> None:
    async with scripted_graph() as graph:
        node = await disk(graph, "disk", CLUSTER + SECTOR)
        survey = Survey(node, CLUSTER, top_only=False)
        assert await survey.run_at(0, node.size) == Run(0, node.size, Content.ZERO)
        scripted(node).put(0, b"d" * node.size)
        assert await survey.run_at(0, node.size) == Run(0, node.size, Content.DATA)


@virtual_time
async def test_the_topmost_layer_alone_tells_holes_from_zeroes() -> None:
    async with scripted_graph() as graph:
        base = await disk(graph, "base", 8 * CLUSTER)
        scripted(base).put(0, b"b" * base.size)
        node = await disk(graph, "disk", 8 * CLUSTER, backing="base")
        await node.write_zeroes(2 * CLUSTER, CLUSTER)
        top, whole = Survey(node, CLUSTER, top_only=True), Survey(node, CLUSTER, top_only=False)
        assert await top.run_at(0, node.size) == Run(0, 2 * CLUSTER, Content.SKIP)
        assert await top.run_at(2 * CLUSTER, node.size) == Run(2 * CLUSTER, 3 * CLUSTER, Content.ZERO)
        assert await whole.run_at(0, node.size) == Run(0, 2 * CLUSTER, Content.DATA)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("top_only", [False, True])
@virtual_time
async def test_runs_agree_with_a_look_at_each_sector(seed: int, top_only: bool) -> None:  # noqa: FBT001
    rng = Random(seed)  # noqa: S311
    async with scripted_graph() as graph:
        size = 16 * CLUSTER + rng.randrange(128) * SECTOR
        node = await disk(graph, "disk", size)
        kinds = scripted(node).kinds
        for _ in range(rng.randrange(12)):
            first = rng.randrange(len(kinds))
            length = min(rng.choice([1, 128, 300]), len(kinds) - first)
            kinds[first : first + length] = bytes([rng.randrange(3)]) * length
        survey, offset = Survey(node, CLUSTER, top_only=top_only), 0
        while offset < size:
            run = await survey.run_at(offset, size)
            assert run.offset == offset < run.end
            for start in range(offset, run.end, CLUSTER):
                seen = set(kinds[start // SECTOR : (start + CLUSTER) // SECTOR])
                if not top_only:
                    wanted = Content.DATA if 1 in seen else Content.ZERO
                else:
                    wanted = Content.SKIP if seen == {0} else Content.ZERO if seen == {2} else Content.DATA
                assert run.content is wanted
            offset = run.end
