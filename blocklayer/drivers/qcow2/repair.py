"""Check and repair of an open image file: feeds the pure plans with what they want to read, and writes what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from blocklayer.codec.qcow2.check import check
from blocklayer.codec.qcow2.features import Incompatible
from blocklayer.codec.qcow2.repair import plan_flags, plan_leaks, plan_repair

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from blocklayer.codec.qcow2.check_result import CheckResult, ReadRequest
    from blocklayer.codec.qcow2.plan import Step
    from blocklayer.drivers.qcow2.image_file import ImageFile

T = TypeVar("T")


async def check_image(image: ImageFile) -> CheckResult:
    """Count every reference and compare with the refcounts."""
    return await _feed(image, check(image.header, file_size=image.file.size))


async def repair_refcounts(image: ImageFile) -> None:
    """What a dirty bit asks for. Raises ``CorruptImageError`` if no repair would be safe."""
    await repair_image(image, await check_image(image))


async def repair_image(image: ImageFile, result: CheckResult, *, leaks_only: bool = False) -> tuple[int, int]:
    """Make refcounts and COPIED flags fit the references; answers the leaks and the corruptions that were repaired.

    ``leaks_only`` lowers what is too high and leaves what is too low; flags are put right if all counts are then. If
    nothing wrong is left, the dirty and corrupt bits are cleared. ``result`` is what ``check_image`` has just answered;
    it is used up. Raises ``CorruptImageError`` if mappings are broken: then nothing was changed.
    """
    corruptions, leaks = result.repairable, result.leaks.count
    header = image.header
    only_flags = result.counts.count == result.stale_flags
    if leaks_only:
        await _write(image, await _feed(image, plan_leaks(result)))
    if only_flags or not leaks_only:
        await _write(image, await _feed(image, plan_flags(result)))
    if not leaks_only and (plan := plan_repair(result)) is not None:
        await _write(image, plan.steps())
        header = plan.header
    is_clean = only_flags or not leaks_only
    cleared = Incompatible.DIRTY | Incompatible.CORRUPT if is_clean else Incompatible.NONE
    await image.write_header_now(
        refcount_table_offset=header.refcount_table_offset,
        refcount_table_clusters=header.refcount_table_clusters,
        incompatible=image.header.incompatible & ~cleared,
    )
    return leaks, corruptions if is_clean else 0


async def _feed(image: ImageFile, steps: Generator[ReadRequest, bytes, T]) -> T:
    """Read what a pure generator asks for; answers its result."""
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send(bytes(await image.file.read(wanted.offset, wanted.length)))
    except StopIteration as end:
        result: T = end.value
        return result


async def _write(image: ImageFile, steps: Iterable[Step]) -> None:
    """All of ``steps``, durably."""
    for step in steps:
        await image.file.write(step.offset, memoryview(step.data))
    await image.file.flush()
