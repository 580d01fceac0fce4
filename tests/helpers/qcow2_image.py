"""A small qcow2 image in memory, for tests that damage, check and repair images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.base.modes import Preallocation
from blocklayer.codec.qcow2 import header as qcow2_header
from blocklayer.codec.qcow2.check import check, run_check
from blocklayer.codec.qcow2.create import CreateOptions, plan_create
from tests.helpers.crash import apply

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.check_result import CheckResult

CLUSTER = 512


class Image:
    """A preallocated image in memory: 100 data clusters behind two L2 tables."""

    def __init__(self, **options: object) -> None:
        settings = {"cluster_size": CLUSTER, "preallocation": Preallocation.METADATA, **options}
        plan = plan_create(CreateOptions(100 * CLUSTER, **settings))  # type: ignore[arg-type]  # keyword table
        self.plan = plan
        self.header = plan.header
        self.data = apply(bytearray(plan.file_size), plan.writes())

    def word(self, offset: int) -> int:
        """The 8-byte word at a file offset."""
        return int.from_bytes(self.data[offset : offset + 8], "big")

    def put(self, offset: int, word: int, width: int = 8) -> None:
        """Overwrite a word."""
        self.data[offset : offset + width] = word.to_bytes(width, "big")

    def check(self) -> CheckResult:
        """Run the check on the header as it is in the file."""
        header = qcow2_header.parse(bytes(self.data[: self.header.cluster_size]), file_size=len(self.data))
        return run_check(check(header, file_size=len(self.data)), lambda at, count: bytes(self.data[at : at + count]))

    @property
    def l2(self) -> int:
        """Offset of the first L2 table."""
        return self.plan.l2_tables.offset

    def refcount_offset(self, cluster: int) -> int:
        """Where the 16-bit refcount of a cluster is (all blocks are neighbours)."""
        return self.plan.refcount_blocks.offset + 2 * cluster
