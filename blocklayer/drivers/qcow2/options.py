"""Options of qcow2 nodes; sizes in bytes. Names and defaults are QEMU's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blocklayer.base.units import MIB

L2_CACHE_DEFAULT: Final = 32 * MIB
"""Covers 256 GiB with 64 KiB clusters."""

REFCOUNT_CACHE_DEFAULT: Final = 4 * MIB
"""Needed by writers only, who go through it from front to back."""


@dataclass(frozen=True, slots=True)
class Qcow2Options:
    """``lazy_refcounts`` None: as the image says. ``pass_discard_request``: give freed space back to the file.

    ``repairing``: for ``check`` and ``repair`` only. A dirty image is not repaired at once, one that is marked corrupt is
    not refused, and guest writes are.
    """

    l2_cache_size: int = L2_CACHE_DEFAULT
    refcount_cache_size: int = REFCOUNT_CACHE_DEFAULT
    lazy_refcounts: bool | None = None
    pass_discard_request: bool = True
    repairing: bool = False
