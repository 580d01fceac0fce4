"""The last walk of a check: refcount blocks against recomputed references. Layer ``codec``: pure.

A block and its references are compared as strings of bytes; only where they differ are single clusters looked at.
A block whose entry is missing counts zero for all its clusters. Clusters behind the file's end count for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from blocklayer.codec.qcow2.check_result import ReadRequest
from blocklayer.codec.qcow2.refcounts import RefcountBlock
from blocklayer.codec.qcow2.references import MANY, Mark

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from blocklayer.codec.qcow2.check_result import CheckResult

_ZERO_OR_ONE: Final = b"\0\1"
_IS_ONE: Final = bytes(value == 1 for value in range(256))
_IS_COPIED: Final = bytes(bool(value & Mark.COPIED) for value in range(256))
_IS_UNCOPIED: Final = bytes(bool(value & Mark.UNCOPIED) for value in range(256))
_NOT_UNCOPIED: Final = bytes(value for value in range(256) if not value & Mark.UNCOPIED)
_NOT_SHARED: Final = bytes(
    value for value in range(256) if sum(bool(value & mark) for mark in (Mark.OWN, Mark.TABLE, Mark.DATA)) < 2
)
"""Marks of clusters that have one use only."""


def compare_counts(result: CheckResult) -> Generator[ReadRequest, bytes, None]:
    """Compare all blocks; fills ``counts``, ``leaks``, ``flags``, ``broken`` and ``image_end_offset`` of ``result``."""
    geometry = result.header.geometry
    clusters = max(geometry.clusters_for(result.file_size), result.references.end)
    for index in _block_indices(result):
        first = index * geometry.refcount_block_entries
        count = min(geometry.refcount_block_entries, clusters - first)
        if count <= 0:
            continue
        block = yield from load_block(result, index)
        _compare_block(result, block, index, first, count)


def _block_indices(result: CheckResult) -> list[int]:
    """Blocks that exist, or that would be needed for what is referred to."""
    existing = {index for index, offset in enumerate(result.refcount_table) if offset}
    return sorted(existing | result.references.used_ranges(result.header.geometry.refcount_block_entries))


def load_block(result: CheckResult, index: int) -> Generator[ReadRequest, bytes, RefcountBlock]:
    """A refcount block as it stands in the file; zeroes where there is none."""
    cluster = result.header.cluster_size
    offset = result.refcount_table[index] if index < len(result.refcount_table) else 0
    data = bytes(cluster)
    if offset:
        data = yield ReadRequest(offset, cluster)
    return RefcountBlock(result.header.refcount_order, bytearray(data[:cluster].ljust(cluster, b"\0")))


def _compare_block(result: CheckResult, block: RefcountBlock, index: int, first: int, count: int) -> None:
    actual = saturated(block, count)
    expected = result.references.count_bytes(first, count)
    marks = result.references.mark_bytes(first, count)
    used = max(len(actual.rstrip(b"\0")), len(expected.rstrip(b"\0")))
    if used:
        result.image_end_offset = max(result.image_end_offset, (first + used) << result.header.cluster_bits)
    same = actual == expected and MANY not in actual
    if not same and _compare_clusters(result, block, first, zip(actual, expected, strict=True)):
        result.mismatched_blocks.add(index)
    if marks.translate(None, _NOT_SHARED):
        _report_shared(result, first, marks)
    if same and not actual.translate(None, _ZERO_OR_ONE) and not marks.translate(None, _NOT_UNCOPIED):
        return
    text = "the COPIED flag does not fit the refcount"
    for position in _wrong_flags(marks, actual):
        result.counts.add((first + position) << result.header.cluster_bits, text)
        result.stale_flags += 1
    for position in _wrong_flags(marks, expected):
        result.flags.add((first + position) << result.header.cluster_bits, text)


def saturated(block: RefcountBlock, count: int) -> bytes:
    """The first ``count`` counters, one byte each, ``MANY`` for all that are larger."""
    width = block.value_max.bit_length() // 8
    if width <= 1:
        return block.load(0, count).tobytes()
    data = block.data[: count * width]
    if not any(data[column::width].strip(b"\0") for column in range(width - 1)):
        return bytes(data[width - 1 :: width])
    return bytes(min(value, MANY) for value in block.load(0, count))


def _compare_clusters(result: CheckResult, block: RefcountBlock, first: int, pairs: Iterable[tuple[int, int]]) -> bool:
    """Report each difference; answer whether there was one."""
    differs = False
    for position, (refcount, references) in enumerate(pairs):
        if refcount == references != MANY:
            continue
        counted = block.get(position) if refcount == MANY else refcount
        needed = result.references.get(first + position)
        if counted == needed:
            continue
        findings = result.counts if counted < needed else result.leaks
        offset = (first + position) << result.header.cluster_bits
        findings.add(offset, f"the refcount is {counted}, but there are {needed} references")
        differs = True
    return differs


def _report_shared(result: CheckResult, first: int, marks: bytes) -> None:
    fine = frozenset(_NOT_SHARED)
    for position, mark in enumerate(marks):
        if mark not in fine:
            offset = (first + position) << result.header.cluster_bits
            result.broken.add(offset, "the cluster is used for two things at once (metadata overlap)")


def _wrong_flags(marks: bytes, counts: bytes) -> list[int]:
    """Positions where an active entry has COPIED and the count is not 1, or lacks it and the count is 1."""
    copied = int.from_bytes(marks.translate(_IS_COPIED), "little")
    uncopied = int.from_bytes(marks.translate(_IS_UNCOPIED), "little")
    ones = int.from_bytes(counts.translate(_IS_ONE), "little")
    wrong = (copied ^ (copied & ones)) | (uncopied & ones)
    if not wrong:
        return []
    flags = wrong.to_bytes(len(marks), "little")
    return [position for position, flag in enumerate(flags) if flag]
