"""The peer of backups: qemu-storage-daemon, driven by QMP over its standard input and output.

One daemon serves one measurement. It never outlives ``running``, and what it writes to stderr is in the error that
a failed start raises.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import deque
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PROGRAM = "qemu-storage-daemon"

ANSWER_S = 300.0
"""No command or event of a benchmark takes longer; a daemon that is silent for this long hangs."""

STOP_S = 30.0
"""Time to quit, closing and flushing images."""

LINE_MAX = 1 << 20
"""Longest message in bytes that is expected."""


class DaemonError(Exception):
    """The daemon refused a command, or a job in it failed."""


class StorageDaemon:
    """A running daemon. Commands are sent one at a time by one task; events wait until they are asked for."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        """Made by ``running``."""
        self._process = process
        self._events: deque[dict[str, Any]] = deque()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    async def execute(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - whatever the command returns
        """Run a QMP command; ``_`` in the names of ``arguments`` stands for ``-``. ``DaemonError`` if it is refused."""
        writer = self._process.stdin
        if writer is None:
            raise DaemonError("the daemon has no monitor")
        message = {"execute": command, "arguments": {key.replace("_", "-"): value for key, value in arguments.items()}}
        writer.write(json.dumps(message).encode() + b"\n")
        await writer.drain()
        while True:
            answer = await self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise DaemonError(f"{command}: {answer['error']['desc']}")
            self._events.append(answer)

    async def wait_event(self, name: str) -> dict[str, Any]:
        """The data of the next event called ``name``; other events before it are dropped."""
        while True:
            event = self._events.popleft() if self._events else await self._receive()
            if event.get("event") == name:
                data: dict[str, Any] = event["data"]
                return data

    async def finish_job(self) -> None:
        """Wait until the backup has completed; ``DaemonError`` if it failed."""
        data = await self.wait_event("BLOCK_JOB_COMPLETED")
        if "error" in data:
            raise DaemonError(f"the backup failed: {data['error']}")

    async def forget_job(self) -> None:
        """Wait until the completed job is gone, and with it its hold on the nodes."""
        while (await self.wait_event("JOB_STATUS_CHANGE"))["status"] != "null":
            pass

    async def _receive(self) -> dict[str, Any]:
        reader = self._process.stdout
        line = b"" if reader is None else await asyncio.wait_for(reader.readline(), ANSWER_S)
        if not line:
            raise DaemonError("the daemon is gone")
        message: dict[str, Any] = json.loads(line)
        return message


@asynccontextmanager
async def running() -> AsyncIterator[StorageDaemon]:
    """Start a daemon, and stop it at the end whatever happens."""
    process = await asyncio.create_subprocess_exec(
        PROGRAM,
        "--chardev",
        "stdio,id=monitor",
        "--monitor",
        "chardev=monitor",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_MAX,
    )
    daemon = StorageDaemon(process)
    try:
        await daemon._receive()  # noqa: SLF001 - the greeting
        await daemon.execute("qmp_capabilities")
        yield daemon
        await daemon.execute("quit")
        await asyncio.wait_for(process.wait(), STOP_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def node_options(name: str, path: Path, image_format: str, *, unsafe: bool) -> dict[str, Any]:
    """``blockdev-add`` arguments of a disk on a file, as ``-drive file=...`` would make them (worker threads).

    ``unsafe``: flushes are ignored, as ``cache=unsafe`` does.
    """
    return {
        "driver": image_format,
        "node_name": name,
        "cache": {"direct": False, "no-flush": unsafe},
        "file": {"driver": "file", "filename": str(path), "aio": "threads"},
    }


def peak_memory(pid: int) -> int:
    """Bytes of the resident set's high-water mark of a process, by ``/proc/PID/status``."""
    match = re.search(
        r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace"), re.MULTILINE
    )
    if match is None:
        raise ProcessLookupError(f"process {pid} tells no peak memory")
    return int(match[1]) * 1024
