"""Making a new image: performs the pure plan of ``codec.qcow2.create``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocklayer.base.buffers import ZEROES
from blocklayer.base.modes import Preallocation
from blocklayer.base.options import Options, build
from blocklayer.base.ranges import split
from blocklayer.codec.qcow2.create import CreateOptions, CreatePlan, plan_create
from blocklayer.graph.gate import resolve

if TYPE_CHECKING:
    from blocklayer.graph.child import Child
    from blocklayer.graph.opener import CreateContext


async def create_image(options: Options, context: CreateContext) -> None:
    """Lay out an image in ``context.file``, the header last; an external data file is made beside it."""
    wanted = build(CreateOptions, options)
    plan = plan_create(wanted)
    data = context.file
    if wanted.data_file is not None:
        data = await context.create_file(resolve(wanted.data_file, context.filename))
        await data.truncate(plan.header.size)
    await _preallocate(plan, context.file, data)
    await context.file.truncate(max(plan.file_size, context.file.size))
    for write in plan.writes():
        await context.file.write(write.offset, memoryview(write.data))
    if data is not context.file:
        await data.flush()


async def _preallocate(plan: CreatePlan, file: Child, data: Child) -> None:
    if plan.preallocation is Preallocation.FALLOC:
        if data is not file:
            await data.truncate(0)
        await data.truncate(plan.guest.end, Preallocation.FALLOC)
    elif plan.preallocation is Preallocation.FULL:
        for piece in split(plan.guest.offset, plan.guest.length, length_max=len(ZEROES)):
            await data.write(piece.offset, ZEROES[: piece.length])
