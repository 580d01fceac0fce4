"""Block status over chains of any depth: who answers for a place, what a shorter layer leaves, and down to which base."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocklayer.base.errors import NotFoundError, OutOfRangeError
from blocklayer.base.extents import Extent, ExtentKind
from blocklayer.base.units import SECTOR
from blocklayer.graph.block_status import layers
from tests.helpers.scripted import disk, scripted
from tests.helpers.strict import strict_graph
from tests.helpers.virtual_time import run_virtual

if TYPE_CHECKING:
    from blocklayer.graph.graph import Graph
    from blocklayer.graph.node import Node

DATA, ZERO, UNALLOCATED = ExtentKind.DATA, ExtentKind.ZERO, ExtentKind.UNALLOCATED
S = SECTOR


async def chain(graph: Graph, *sectors: str) -> list[Node]:
    """Layers, top first: "." is a sector that is unallocated, "0" one of zeroes, a letter one of data."""
    nodes: list[Node] = []
    for number, text in reversed(list(enumerate(sectors))):
        backing = {"backing": nodes[0]} if nodes else {}
        node = await disk(graph, f"L{number}", len(text) * S, **backing, **{"read-only": number > 0})
        driver = scripted(node)
        for sector, letter in enumerate(text):
            driver.put(sector * S, (b"\0" if letter in ".0" else letter.encode()) * S)
            driver.kinds[sector] = {".": 0, "0": 2}.get(letter, 1)
        nodes.insert(0, node)
    return nodes


async def told(top: Node, base: Node | None = None) -> list[tuple[int, str, int, str]]:
    """Extents in sectors: (length, kind, depth, node)."""
    return [(e.length // S, e.kind.value, e.depth, e.node) async for e in top.extents(base=base)]


async def test_each_layer_answers_for_what_it_holds() -> None:
    async with strict_graph() as graph:
        nodes = await chain(graph, "a...0...", ".b..b.0.", "..cc.c..")
        assert await told(nodes[0]) == [
            (1, "data", 0, "L0"),
            (1, "data", 1, "L1"),
            (2, "data", 2, "L2"),
            (1, "zero", 0, "L0"),
            (1, "data", 2, "L2"),
            (1, "zero", 1, "L1"),
            (1, "zero", 2, "L2"),
        ]
        assert await nodes[0].read(0, 8 * S) == b"".join(
            letter * S for letter in (b"a", b"b", b"c", b"c", b"\0", b"c", b"\0", b"\0")
        )


async def test_what_no_layer_holds_is_the_bottoms_and_not_present() -> None:
    async with strict_graph() as graph:
        top, *_ = await chain(graph, "..", "..", "..")
        assert [extent async for extent in top.extents()] == [
            Extent(0, 2 * S, ZERO, depth=2, node="L2", present=False),
        ]
        alone, *_ = await chain_named(graph, "..")
        assert [extent.depth async for extent in alone.extents()] == [0]


async def chain_named(graph: Graph, text: str) -> list[Node]:
    """One layer of another name."""
    return [await disk(graph, "alone", len(text) * S)]


async def test_behind_the_end_of_a_shorter_layer_zeroes_belong_to_the_layer_above_it() -> None:
    async with strict_graph() as graph:
        top, middle, _ = await chain(graph, "......", "....", "cccccc")
        assert await told(top) == [(4, "data", 2, "L2"), (2, "zero", 0, "L0")]
        behind = await top.block_status(4 * S, 2 * S)
        assert behind == Extent(4 * S, 2 * S, ZERO, depth=0, node="L0", present=False)
        assert await top.read(0, 6 * S) == b"c" * 4 * S + bytes(2 * S)
        assert await told(middle) == [(4, "data", 1, "L2")]


async def test_a_shorter_bottom_leaves_zeroes_in_the_layer_above_it() -> None:
    async with strict_graph() as graph:
        top, *_ = await chain(graph, "....", "....", "cc")
        assert await told(top) == [(2, "data", 2, "L2"), (2, "zero", 1, "L1")]
        assert await top.read(S, 3 * S) == b"c" * S + bytes(2 * S)


async def test_an_answer_ends_where_a_shorter_layer_does() -> None:
    async with strict_graph() as graph:
        top, *_ = await chain(graph, "....", "cc")
        status = await top.block_status(S, 3 * S)
        assert (status.offset, status.length, status.kind) == (S, S, DATA)


async def test_down_to_a_base_what_the_layers_above_do_not_hold_is_unallocated() -> None:
    async with strict_graph() as graph:
        top, middle, base = await chain(graph, "a...", ".b..", "cccc")
        assert await told(top, base) == [(1, "data", 0, "L0"), (1, "data", 1, "L1"), (2, "unallocated", 0, "")]
        assert await told(top, middle) == [(1, "data", 0, "L0"), (3, "unallocated", 0, "")]
        assert await told(middle, base) == [(1, "unallocated", 0, ""), (1, "data", 0, "L1"), (2, "unallocated", 0, "")]


async def test_a_node_is_its_own_base_above_which_nothing_is() -> None:
    async with strict_graph() as graph:
        top, _ = await chain(graph, "ab", "cc")
        assert await told(top, top) == [(2, "unallocated", 0, "")]
        assert await top.is_allocated_above(0, 2 * S, top) == (False, 2 * S)


async def test_a_base_that_is_not_in_the_chain_is_an_error_that_names_both() -> None:
    async with strict_graph() as graph:
        top, base = await chain(graph, "..", "cc")
        stranger = await disk(graph, "stranger", 2 * S)
        with pytest.raises(NotFoundError, match="^node 'stranger' is not in the backing chain of 'L0'$"):
            await top.block_status(0, S, base=stranger)
        with pytest.raises(NotFoundError, match="'L0' is not in the backing chain of 'L1'"):
            await base.is_allocated_above(0, S, top)


async def test_is_allocated_asks_this_layer_alone() -> None:
    async with strict_graph() as graph:
        top, middle, _ = await chain(graph, "aa0.", "bbbb", "cccc")
        assert await top.is_allocated(0, 4 * S) == (True, 2 * S)
        assert await top.is_allocated(2 * S, 2 * S) == (True, S)
        assert await top.is_allocated(3 * S, S) == (False, S)
        assert await middle.is_allocated(0, 4 * S) == (True, 4 * S)


async def test_is_allocated_above_asks_all_layers_down_to_the_base() -> None:
    async with strict_graph() as graph:
        top, middle, base = await chain(graph, "a...", ".b..", "ccc.")
        assert await top.is_allocated_above(0, 4 * S, base) == (True, S)
        assert await top.is_allocated_above(S, 3 * S, base) == (True, S)
        assert await top.is_allocated_above(2 * S, 2 * S, base) == (False, 2 * S)
        assert await top.is_allocated_above(S, 3 * S, middle) == (False, 3 * S)
        assert await top.is_allocated_above(2 * S, 2 * S, None) == (True, S)
        assert await top.is_allocated_above(3 * S, S, None) == (False, S)


async def test_filters_are_no_layers() -> None:
    async with strict_graph() as graph:
        _, base = await chain(graph, "....", "bb..")
        filtered = await graph.open({"driver": "plain-filter", "file": base}, read_only=True)
        top = await disk(graph, "top", 4 * S, backing=filtered, **{"read-only": True})
        scripted(top).put(0, b"t" * S)
        above = await graph.open({"driver": "plain-filter", "file": top}, read_only=True)
        expected = [(1, "data", 0, "top"), (1, "data", 1, "L1"), (2, "zero", 1, "L1")]
        assert await told(above) == expected
        assert await told(top) == expected
        assert await told(above, filtered) == [(1, "data", 0, "top"), (3, "unallocated", 0, "")]
        assert await told(above, base) == await told(above, filtered)
        assert [node.name for node in layers(above)] == ["top", "L1"]
        assert await above.is_allocated(0, 4 * S) == (True, S)


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (-S, S), (0, 5 * S), (4 * S, S), (4 * S, 0), (S, -1)])
async def test_a_range_outside_the_node_or_an_empty_one_has_no_status(offset, length) -> None:
    async with strict_graph() as graph:
        top, base = await chain(graph, "....", "....")
        for ask in (
            lambda: top.block_status(offset, length),
            lambda: top.is_allocated(offset, length),
            lambda: top.is_allocated_above(offset, length, None),
            lambda: top.is_allocated_above(offset, length, base),
        ):
            with pytest.raises(OutOfRangeError) as raised:
                await ask()
            assert (raised.value.node, raised.value.offset, raised.value.length) == ("L0", offset, length)


async def test_extents_of_a_part_start_and_end_where_it_does() -> None:
    async with strict_graph() as graph:
        top, *_ = await chain(graph, "aa..", "bbbb")
        assert [(e.offset, e.length) async for e in top.extents(S + 100, 2 * S)] == [
            (S + 100, S - 100),
            (2 * S, S + 100),
        ]
        assert [e.range async for e in top.extents(3 * S)] == [(3 * S, S)]
        assert [e async for e in top.extents(4 * S)] == []
        assert [e async for e in top.extents(S, 0)] == []
        with pytest.raises(OutOfRangeError):
            [e async for e in top.extents(S, 4 * S)]


async def test_neighbours_that_are_alike_are_one_extent() -> None:
    async with strict_graph() as graph:
        node = await graph.open({"driver": "strict", "size": 4 * S})
        whole = [extent async for extent in node.extents()]
        assert [(e.length, e.host_offset) for e in whole] == [(4 * S, 0)]


LAYER = st.text("..0a", min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(LAYER, min_size=1, max_size=4), st.integers(0, 3))
def test_extents_say_of_each_sector_what_a_walk_down_the_layers_finds(texts: list[str], base_at: int) -> None:
    def walk(sector: int, texts: list[str]) -> tuple[str, int]:
        for depth, text in enumerate(texts):
            if sector >= len(text):
                return "zero", depth - 1
            if text[sector] != ".":
                return ("zero" if text[sector] == "0" else "data"), depth
        return "unallocated", 0

    async def main() -> None:
        async with strict_graph() as graph:
            nodes = await chain(graph, *texts)
            base = nodes[base_at] if 0 < base_at < len(nodes) else None
            found: list[tuple[str, int]] = []
            end = 0
            async for extent in nodes[0].extents(base=base):
                assert extent.offset == end
                end = extent.end
                found += [(extent.kind.value, extent.depth)] * (extent.length // S)
            expected = [walk(sector, texts[: base_at if base else None]) for sector in range(len(texts[0]))]
            if base is None:
                expected = [("zero", len(texts) - 1) if kind == "unallocated" else (kind, d) for kind, d in expected]
            assert found == expected
            content = await nodes[0].read(0, nodes[0].size)
            for sector in range(len(texts[0])):
                data = walk(sector, texts)[0] == "data"
                assert content[sector * S : (sector + 1) * S] == (b"a" if data else b"\0") * S

    run_virtual(main())
