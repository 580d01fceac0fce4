"""Check and repair of an open image file: feeds the pure checker with what it wants to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.codec.qcow2.check import check
from blocklayer.codec.qcow2.features import Incompatible
from blocklayer.codec.qcow2.repair import plan_repair

if TYPE_CHECKING:
    from blocklayer.codec.qcow2.check_result import CheckResult
    from blocklayer.drivers.qcow2.image_file import ImageFile


async def check_image(image: ImageFile) -> CheckResult:
    """Count every reference and compare with the refcounts."""
    steps = check(image.header, file_size=image.file.size)
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send(bytes(await image.file.read(wanted.offset, wanted.length)))
    except StopIteration as end:
        result: CheckResult = end.value
        return result


async def repair_refcounts(image: ImageFile) -> None:
    """Make refcounts equal references and clear the dirty bit. Raises ``CorruptImageError`` if that would not be safe."""
    result = await check_image(image)
    plan = plan_repair(result)
    header = image.header
    if plan is not None:
        for step in plan.steps():
            await image.file.write(step.offset, memoryview(step.data))
        await image.file.flush()
        header = plan.header
    await image.write_header_now(
        refcount_table_offset=header.refcount_table_offset,
        refcount_table_clusters=header.refcount_table_clusters,
        incompatible=image.header.incompatible & ~Incompatible.DIRTY,
    )
