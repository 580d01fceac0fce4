"""Repair of refcounts and COPIED flags from the references that a check found. Layer ``codec``: pure.

    plan_flags   COPIED flags of the active tables that contradict the references; to be done first
    plan_repair  refcounts: wrong blocks are rewritten where they are; where a block is missing, misplaced or shared, a
                 whole new refcount structure is laid out behind the end of the image, and the header switches to it
    plan_leaks   refcounts that are too high, and nothing else

An image whose mappings are broken is refused: writing to it would destroy data whatever its refcounts say.
The plans that read are generators like ``check``: they yield ``ReadRequest`` and are sent bytes.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from blocklayer.base.errors import CorruptImageError, LimitError
from blocklayer.base.ranges import div_round_up
from blocklayer.codec.qcow2.check import read_table
from blocklayer.codec.qcow2.check_counts import load_block
from blocklayer.codec.qcow2.check_result import Findings
from blocklayer.codec.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, dump_table
from blocklayer.codec.qcow2.geometry import WORD
from blocklayer.codec.qcow2.plan import Role, Step
from blocklayer.codec.qcow2.refcounts import RefcountBlock
from blocklayer.codec.qcow2.references import MANY

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from blocklayer.codec.qcow2.check_result import CheckResult, ReadRequest
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
    _refuse_broken(result)
    if result.flags.count:
        first = result.flags.described[0]
        raise CorruptImageError(f"cannot repair refcounts: {first.text}", offset=first.offset)
    table = result.refcount_table
    missing = [index for index in result.mismatched_blocks if index >= len(table) or not table[index]]
    if result.rebuild or missing:
        return _rebuild(result)
    if not result.mismatched_blocks:
        return None
    blocks = {index: table[index] for index in sorted(result.mismatched_blocks)}
    return RepairPlan(result.header, result.file_size, result, blocks)


def _refuse_broken(result: CheckResult) -> None:
    if result.broken.count:
        first = result.broken.described[0]
        raise CorruptImageError(f"cannot repair refcounts: {first.text}", offset=first.offset)


def plan_leaks(result: CheckResult) -> Generator[ReadRequest, bytes, list[Step]]:
    """Lower what is too high, and leave what is too low. Raises ``CorruptImageError`` where references are not certain."""
    _refuse_broken(result)
    if result.rebuild:
        raise CorruptImageError("cannot free leaked clusters: the refcount structure has to be rebuilt; repair all")
    steps: list[Step] = []
    for index in sorted(result.mismatched_blocks):
        if index >= len(result.refcount_table) or not result.refcount_table[index]:
            continue
        block = yield from load_block(result, index)
        first = index * len(block)
        before = bytes(block.data)
        for position, refcount in enumerate(block.load(0, len(block))):
            if refcount > (references := result.references.get(first + position)):
                block.set(position, references)
        if block.data != before:
            steps.append(Step(Role.REFCOUNT_LOWER, result.refcount_table[index], bytes(block.data)))
    return steps


def plan_flags(result: CheckResult) -> Generator[ReadRequest, bytes, list[Step]]:
    """COPIED where there is exactly one reference, in the active L1 table and the L2 tables below it.

    Takes ``result`` over: its ``flags`` are empty afterwards. Raises ``CorruptImageError`` if mappings are broken.
    """
    _refuse_broken(result)
    if not result.flags.count:
        return []
    header = result.header
    l1 = yield from read_table(header.l1_table_offset, header.l1_size * WORD)
    steps = _right_flags(result, header.l1_table_offset, l1, stride=1)
    for entry in l1:
        if (offset := entry & OFFSET_MASK) and not header.has_data_file:  # there the flag is always set
            words = yield from read_table(offset, header.cluster_size)
            steps += _right_flags(result, offset, words, stride=header.geometry.l2_entry_words)
    result.flags = Findings()
    return steps


def _right_flags(result: CheckResult, offset: int, words: array[int], *, stride: int) -> list[Step]:
    """The table at ``offset`` with right flags, if it has wrong ones."""
    right = words[:]
    for at in range(0, len(words), stride):
        place = words[at] & OFFSET_MASK
        if place and not words[at] & COMPRESSED:
            alone = result.references.get(place >> result.header.cluster_bits) == 1
            right[at] = words[at] | COPIED if alone else words[at] & ~COPIED
    return [Step(Role.MAPPING, offset, dump_table(right))] if right != words else []


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
