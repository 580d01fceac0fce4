"""What a driver can take in one request. The Node aligns and splits by these, so that no driver has to."""

from __future__ import annotations

from dataclasses import dataclass

from blocklayer.base.ranges import is_power_of_two
from blocklayer.base.units import GIB, MIB

TRANSFER_MAX = 64 * MIB
"""Largest single read or write below the Node: bounds what one request can pin in memory."""

ZEROES_MAX = GIB
"""Largest single write_zeroes or discard below the Node: bounds how long one request blocks others."""


@dataclass(frozen=True, slots=True)
class BlockLimits:
    """Limits in bytes. ``request_alignment`` binds reads and writes; the others are what works best.

    ``request_alignment``  power of two; offset and length of every read and write that reaches the driver
    ``memory_alignment``   power of two; address of the buffers (O_DIRECT)
    ``transfer_max``       longest read or write
    ``zeroes_max``         longest write_zeroes or discard
    ``optimal_transfer``   preferred unit of bulk work, e.g. the cluster size
    """

    request_alignment: int = 1
    memory_alignment: int = 1
    transfer_max: int = TRANSFER_MAX
    zeroes_max: int = ZEROES_MAX
    optimal_transfer: int = MIB

    def __post_init__(self) -> None:
        """Check that alignments are powers of two and that limits are multiples of the request alignment."""
        for name in ("request_alignment", "memory_alignment"):
            if not is_power_of_two(getattr(self, name)):
                raise ValueError(f"{name} must be a power of two, not {getattr(self, name)}")
        for name in ("transfer_max", "zeroes_max"):
            length = getattr(self, name)
            if length < self.request_alignment or length % self.request_alignment:
                raise ValueError(f"{name} {length} is no multiple of {self.request_alignment}")
