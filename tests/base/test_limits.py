"""What a driver can take: limits that no loop could work with are refused when they are made."""

from __future__ import annotations

import pytest

from blocklayer.base.limits import TRANSFER_MAX, ZEROES_MAX, BlockLimits
from blocklayer.base.units import GIB, MIB


def test_by_default_there_is_no_alignment_and_requests_are_bounded():
    assert BlockLimits() == BlockLimits(1, 1, TRANSFER_MAX, ZEROES_MAX, MIB)
    assert (TRANSFER_MAX, ZEROES_MAX) == (64 * MIB, GIB)


@pytest.mark.parametrize("name", ["request_alignment", "memory_alignment"])
@pytest.mark.parametrize("value", [0, -1, 3, 511, 513])
def test_an_alignment_is_a_power_of_two(name, value):
    with pytest.raises(ValueError) as caught:
        BlockLimits(**{name: value})
    assert str(caught.value) == f"{name} must be a power of two, not {value}"


@pytest.mark.parametrize("name", ["transfer_max", "zeroes_max"])
@pytest.mark.parametrize("value", [-512, 0, 256, 513, 1000])
def test_the_longest_request_is_a_positive_multiple_of_the_alignment(name, value):
    """Splitting by anything else would send unaligned pieces, or never end."""
    with pytest.raises(ValueError) as caught:
        BlockLimits(request_alignment=512, **{name: value})
    assert str(caught.value) == f"{name} {value} is no multiple of 512"


@pytest.mark.parametrize("value", [512, 1024, 1536])
def test_any_multiple_of_the_alignment_will_do(value):
    limits = BlockLimits(request_alignment=512, transfer_max=value, zeroes_max=value)
    assert (limits.transfer_max, limits.zeroes_max) == (value, value)
