"""Findings are counted all and described up to a bound."""

from __future__ import annotations

from blocklayer.codec.qcow2.check_result import DESCRIBED_MAX, Finding, Findings
from tests.helpers.qcow2_image import Image


def test_descriptions_are_bounded_and_counts_are_not() -> None:
    """An image with more damage than anyone reads."""
    image = Image(refcount_bits=8, cluster_size=1024)
    image.data[image.plan.refcount_blocks.offset :][:100] = bytes(100)
    block = image.plan.refcount_blocks
    image.data[block.offset : block.end] = bytes(block.length)
    result = image.check()
    assert result.counts.count > DESCRIBED_MAX
    assert len(result.counts.described) == DESCRIBED_MAX


def test_a_finding_says_where_and_what() -> None:
    """The first ones are kept in order."""
    found = Findings()
    found.add(512, "first")
    found.add(0, "second")
    assert found.count == 2
    assert found.described == [Finding(512, "first"), Finding(0, "second")]
