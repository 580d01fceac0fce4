"""Repair of refcounts from the references that a check found. Layer ``codec``: pure.

Two ways, chosen from the result: wrong blocks are rewritten where they are; where a block is missing, misplaced or
shared, a whole new refcount structure is laid out behind the end of the image, and the header switches to it.

Only refcounts are repaired. An image whose mappings are broken, or whose COPIED flags contradict the references, is
refused: writing to it would destroy data whatever its refcounts say.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from blocklayer.base.errors import CorruptImageError, LimitError
from blocklayer.base.ranges import div_round_up
from blocklayer.codec.qcow2.entries import dump_table
from blocklayer.codec.qcow2.geometry import WORD
from blocklayer.codec.qcow2.plan import Role, Step
from blocklayer.codec.qcow2.refcounts import RefcountBlock
from blocklayer.codec.qcow2.references import MANY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blocklayer.codec.qcow2.check_result import CheckResult
    from blocklayer.codec.qcow2.header import Header


@dataclass(frozen=True, slots=True)
class RepairPlan:
    """Do ``steps()``, in any order, then flush, then write ``header`` (the dirty bit is the caller's to clear).

    ``file_size`` is the file's length afterwards, in bytes. The steps are made one at a time.
    """

    header: Header
    file_size: int
    _result: CheckResult = field(repr=False)
    _blocks: dict[int, int] = field(repr=False)
    _table: bytes = field(repr=False, default=b"")

    def steps(self) -> Iterator[Step]:
        """The blocks, each with its recomputed counts, and the new table if there is one."""
        role = Role.NEW if self._table else Role.REFCOUNT_RAISE
        for index, offset in self._blocks.items():
            yield Step(role, offset, _block(self._result, index))
        if self._table:
            yield Step(role, self.header.refcount_table_offset, self._table)


def plan_repair(result: CheckResult) -> RepairPlan | None:
    """How to make refcounts equal references, or None if they are.

    A rebuild takes ``result`` over: it then describes the image as it will be, and a second call answers None.
    Raises ``CorruptImageError`` for an image that this cannot make safe, ``LimitError`` for one that is too large.
    """
    if result.broken.count or result.flags.count:
        first = (result.broken.described or result.flags.described)[0]
        raise CorruptImageError(f"cannot repair refcounts: {first.text}", offset=first.offset)
    table = result.refcount_table
    missing = [index for index in result.mismatched_blocks if index >= len(table) or not table[index]]
    if result.rebuild or missing:
        return _rebuild(result)
    if not result.mismatched_blocks:
        return None
    blocks = {index: table[index] for index in sorted(result.mismatched_blocks)}
    return RepairPlan(result.header, result.file_size, result, blocks)


def _rebuild(result: CheckResult) -> RepairPlan:
    header, geometry = result.header, result.header.geometry
    references = result.references
    references.subtract(header.refcount_table_offset >> header.cluster_bits, header.refcount_table_clusters)
    for offset in result.refcount_table:
        if offset:
            references.subtract(offset >> header.cluster_bits, 1)
    start = max(geometry.clusters_for(result.file_size), references.end)
    table_clusters, indices = _needed(result, start)
    if table_clusters > geometry.refcount_table_clusters_max:
        raise LimitError("the rebuilt refcount table would be too large")
    references.add(start, table_clusters + len(indices))
    first_block = start + table_clusters
    blocks = {index: (first_block + number) << header.cluster_bits for number, index in enumerate(indices)}
    table = array("Q", bytes(table_clusters << header.cluster_bits))
    for index, offset in blocks.items():
        table[index] = offset
    result.refcount_table, result.rebuild = table, False
    result.mismatched_blocks.clear()
    moved = replace(
        header,
        refcount_table_offset=start << header.cluster_bits,
        refcount_table_clusters=table_clusters,
    )
    return RepairPlan(moved, (first_block + len(indices)) << header.cluster_bits, result, blocks, dump_table(table))


def _needed(result: CheckResult, start: int) -> tuple[int, list[int]]:
    """Clusters of a new table at cluster ``start``, and the blocks that count references and the new structure."""
    geometry = result.header.geometry
    entries = geometry.refcount_block_entries
    used = result.references.used_ranges(entries)
    table_clusters, blocks = 1, len(used)
    while True:
        last = (start + table_clusters + blocks) // entries
        indices = sorted(used | set(range(start // entries, last + 1)))
        needed = max(1, div_round_up((indices[-1] + 1) * WORD, geometry.cluster_size))
        if needed <= table_clusters and len(indices) <= blocks:
            return table_clusters, indices
        table_clusters, blocks = max(table_clusters, needed), max(blocks, len(indices))


def _block(result: CheckResult, index: int) -> bytes:
    geometry = result.header.geometry
    block = RefcountBlock(geometry.refcount_order, bytearray(geometry.cluster_size))
    first = index * geometry.refcount_block_entries
    counts = result.references.count_bytes(first, geometry.refcount_block_entries)
    if MANY in counts:
        block.store(0, [result.references.get(first + position) for position in range(len(counts))])
    else:
        block.store(0, counts)
    return bytes(block.data)
