"""FilterDriver: passes every request on to the child "file", offset by offset. Filters override what they change."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from blocklayer.base.modes import Permission, Preallocation, WriteFlags
from blocklayer.graph.driver import Driver

if TYPE_CHECKING:
    from blocklayer.base.extents import Extent
    from blocklayer.graph.child import Child


class FilterDriver(Driver):
    """A driver whose data are its child's."""

    is_filter: ClassVar[bool] = True

    def __init__(self, file: Child) -> None:
        """``file`` is the child."""
        self.file = file
        self.limits = file.node.driver.limits
        self.growable = file.node.driver.growable

    @classmethod
    def child_permissions(cls, role: str, *, writable: bool) -> tuple[Permission, Permission]:
        """A filter shares its child like the plain user that it is."""
        needed, _ = super().child_permissions(role, writable=writable)
        return needed, Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED

    @property
    def size(self) -> int:
        """The child's."""
        return self.file.size

    @property
    def zero_init(self) -> bool:
        """The child's."""
        return self.file.node.driver.zero_init

    @property
    def can_compress(self) -> bool:
        """The child's."""
        return self.file.node.driver.can_compress

    @property
    def cluster_size(self) -> int | None:
        """The child's."""
        return self.file.node.driver.cluster_size

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Pass on."""
        return self.file.try_read_into(offset, buffer)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Pass on."""
        await self.file.read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Pass on."""
        await self.file.write(offset, data, flags)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """Pass on."""
        await self.file.write_compressed(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Pass on."""
        await self.file.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        """Pass on."""
        await self.file.discard(offset, length)

    def try_block_status(self, offset: int, length: int) -> Extent | None:
        """Pass on."""
        return self.file.node.driver.try_block_status(offset, length)

    async def block_status(self, offset: int, length: int) -> Extent:
        """Pass on."""
        return await self.file.block_status(offset, length)

    async def allocated_size(self) -> int | None:
        """The child's."""
        return await self.file.node.driver.allocated_size()

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        """Pass on."""
        await self.file.truncate(size, preallocation)
