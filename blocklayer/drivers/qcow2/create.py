"""Making a new image: performs the pure plan of ``codec.qcow2.create``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.base.buffers import ZEROES
from blocklayer.base.modes import Preallocation
from blocklayer.base.options import Options, build
from blocklayer.base.ranges import align_up, split
from blocklayer.base.units import SECTOR
from blocklayer.codec.qcow2.create import CreateOptions, CreatePlan, plan_create
from blocklayer.graph.gate import resolve

if TYPE_CHECKING:
    from blocklayer.graph.child import Child
    from blocklayer.graph.opener import CreateContext


async def create_image(options: Options, context: CreateContext) -> None:
    """Lay out an image, the header last; an external data file is made beside it."""
    wanted = build(CreateOptions, await _with_size(options, context))
    plan = plan_create(wanted)
    data = file = await context.create_file(context.filename)
    if wanted.data_file is not None:
        data = await context.create_file(resolve(wanted.data_file, context.filename))
        await data.truncate(plan.header.size)
    await _preallocate(plan, file, data)
    await file.truncate(max(plan.file_size, file.size))
    if data is not file:
        await data.flush()
    for write in plan.writes():
        if not write.offset:
            await file.flush()  # the header makes it an image: all that it names has to be there
        await file.write(write.offset, memoryview(write.data))


async def _with_size(options: Options, context: CreateContext) -> Options:
    """The options with a size: the backing file's if they have none."""
    name, backing_format = options.get("backing-file"), options.get("backing-fmt")
    if "size" in options or not isinstance(name, str):
        return options
    size = await context.backing_size(name, backing_format if isinstance(backing_format, str) else None)
    return {**options, "size": align_up(size, SECTOR)}


async def _preallocate(plan: CreatePlan, file: Child, data: Child) -> None:
    if plan.preallocation is Preallocation.FALLOC:
        if data is not file:
            await data.truncate(0)
        await data.truncate(plan.guest.end, Preallocation.FALLOC)
    elif plan.preallocation is Preallocation.FULL:
        for piece in split(plan.guest.offset, plan.guest.length, length_max=len(ZEROES)):
            await data.write(piece.offset, ZEROES[: piece.length])
