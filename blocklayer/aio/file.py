"""File: one open image file or block device on an engine.

Cache modes are those of ``base.modes.CacheMode``. Invariants
- ``size`` is right at all times for whoever writes through this object; others must not resize the file meanwhile.
- ``fd`` stays open until ``close`` returns, so no worker thread can hit a descriptor that was reused.
- After one failed flush every later flush fails: the kernel reports lost writes once only, and forgets them.
- A way of doing something that the file system refused once is not tried again on this file.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from blocklayer.aio import direct
from blocklayer.aio.fallocate import KEEP_SIZE, PUNCH_HOLE, UNSUPPORTED_ERRNOS, ZERO_RANGE, fallocate
from blocklayer.aio.locking import ImageLock, supported
from blocklayer.base.buffers import ZEROES
from blocklayer.base.errors import IOFailedError, UnsupportedError, from_os_error
from blocklayer.base.modes import CacheMode, Permission, Preallocation
from blocklayer.base.ranges import align_up
from blocklayer.base.units import MIB, SECTOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

    from blocklayer.aio.engine import Engine

_NOWAIT: Final = getattr(os, "RWF_NOWAIT", 0)
_DIRECT: Final = getattr(os, "O_DIRECT", 0)
COPY_RANGE_ERRNOS: Final = UNSUPPORTED_ERRNOS | {errno.EXDEV, errno.EBADF, errno.EPERM}


class File:
    """Made by ``open``. All methods may run at once; offsets and lengths are bytes."""

    def __init__(self, engine: Engine, fd: int, path: str, *, read_only: bool, cache: CacheMode) -> None:
        """Wrap an open descriptor; ``open`` fills in what has to be asked of the system."""
        self.engine = engine
        self.fd = fd
        self.path = path
        self.read_only = read_only
        self.cache = cache
        self.size = 0
        self.is_device = False
        self.request_alignment = 1
        self.memory_alignment = 1
        self.lock: ImageLock | None = None
        self._direct, self._write_through, self._no_flush = cache.direct, cache.write_through, cache.no_flush
        self._nowait = bool(_NOWAIT) and not cache.direct
        self._nowait_flag = _NOWAIT
        self._refused: set[int] = set()  # modes of fallocate that the file system does not know
        self._failed_flush: IOFailedError | None = None
        self._run: tuple[bool, int, int] | None = None  # last answer of _seek: (is_data, start, end)
        self._closed = False

    def __repr__(self) -> str:
        """``<File 'vm.qcow2' fd 7 rw writeback 1048576 bytes>``."""
        return (
            f"<File {self.path!r} fd {self.fd} {'ro' if self.read_only else 'rw'} {self.cache.value} {self.size} bytes>"
        )

    @classmethod
    async def open(
        cls,
        engine: Engine,
        path: str,
        *,
        read_only: bool = False,
        cache: CacheMode = CacheMode.WRITEBACK,
        create: bool = False,
    ) -> Self:
        """Open ``path``; ``create`` makes it if it is not there (it is never truncated here: lock first).

        Raises ``MissingFileError``, ``AccessDeniedError`` and kin.
        """
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe would wait for a peer
        flags |= (os.O_CREAT if create else 0) | (_DIRECT if cache.direct else 0)
        opened: list[int] = []
        try:
            size, is_device, alignment = await engine.call(_open, path, flags, cache.direct, opened)
        except IOFailedError as error:
            error.filename = path
            error.message = error.message.replace("_open", "open")
            raise
        except BaseException:
            _close(opened)  # cancelled: nobody else knows of it
            raise
        fd = opened[0]
        file = cls(engine, fd, path, read_only=read_only, cache=cache)
        file.size, file.is_device = size, is_device
        file.request_alignment, file.memory_alignment = alignment
        if supported(fd):
            file.lock = ImageLock(fd, path)
        return file

    async def close(self) -> None:
        """Close the descriptor, also if this is cancelled. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        closing = [self.fd]
        try:
            await self.engine.call(_close, closing)
        finally:
            _close(closing)  # cancelled before a thread took it

    def change_lock(self, used: Permission, shared: Permission) -> None:
        """Take image locks; nothing happens where the file system has none. Raises ``LockedError``."""
        if self.lock is not None:
            self.lock.change(used, shared)

    # -- reading -----------------------------------------------------------------------------------------------

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` from the page cache at once, or answer False."""
        if not self._nowait:
            return False
        try:
            return os.preadv(self.fd, (buffer,), offset, self._nowait_flag) == len(buffer)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                self._nowait = False
            return False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; zeroes behind the end."""
        try:
            if self._direct:
                args = (self.fd, buffer, offset, self.memory_alignment)
                await self.engine.call(direct.read_direct, *args, weight=len(buffer))
            else:
                await self.engine.read(self.fd, buffer, offset)
        except IOFailedError as error:
            raise self._named(error, "read", offset, len(buffer)) from None

    # -- writing -----------------------------------------------------------------------------------------------

    async def write(self, offset: int, data: memoryview, *, durable: bool = False) -> None:
        """Store ``data``, extending the file if need be."""
        durable = (durable or self._write_through) and not self._no_flush
        self._run = None
        try:
            if self._direct:
                args = (self.fd, (data,), offset, durable, self.memory_alignment)
                await self.engine.call(direct.write_direct, *args, weight=len(data))
            else:
                await self.engine.write(self.fd, (data,), offset, durable=durable)
        except BaseException as error:
            self._measure()
            if isinstance(error, IOFailedError):
                raise self._named(error, "write", offset, len(data)) from None
            raise
        finally:
            self._run = None
        self.size = max(self.size, offset + len(data))

    def start_write(self, offset: int, data: memoryview, done: Callable[[IOFailedError | None], None]) -> bool:
        """Begin a plain write; see ``Driver.start_write``."""
        if self._direct or (self._write_through and not self._no_flush):
            return False

        def finished(error: OSError | None) -> None:
            self._run = None
            if error is not None:
                self._measure()
                done(from_os_error(error, "write", filename=self.path, offset=offset, length=len(data)))
                return
            if offset + len(data) > self.size:  # noqa: PLR1730 - max() costs a call, and this is the hot path
                self.size = offset + len(data)
            done(None)

        self._run = None
        return self.engine.start_write(self.fd, data, offset, finished)

    async def write_zeroes(
        self, offset: int, length: int, *, may_unmap: bool, fallback: bool = True, durable: bool = False
    ) -> None:
        """Make the range read as zeroes: by a hole if ``may_unmap``, else by reserved zeroes, else by writing.

        Raises ``UnsupportedError`` instead of writing if ``fallback`` is false.
        """
        with self._changing():
            inside = min(length, max(0, self.size - offset))
            zeroed = may_unmap and await self._try_punch(offset, inside)
            zeroed = zeroed or await self._try_allocate(ZERO_RANGE, offset, length)
            if not zeroed and not fallback:
                message = "the file system has no fast way to write zeroes"
                raise UnsupportedError(message, filename=self.path, offset=offset, length=length)
            if not zeroed:
                for start in range(0, length, MIB):
                    await self.write(offset + start, ZEROES[: min(MIB, length - start)])
            if offset + length > self.size:
                await self._extend(offset + length)
        if durable or self._write_through:
            await self.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Give the range's space back, where the file system can; it reads as zeroes then."""
        with self._changing():
            await self._try_punch(offset, min(length, max(0, self.size - offset)))

    async def _try_punch(self, offset: int, length: int) -> bool:
        mode = PUNCH_HOLE | KEEP_SIZE
        return await self._try_allocate(mode, offset, length) if length > 0 else mode not in self._refused

    async def _try_allocate(self, mode: int, offset: int, length: int) -> bool:
        """``fallocate``, or False where it cannot do this."""
        if mode in self._refused:
            return False
        try:
            await self.engine.allocate(self.fd, mode, offset, length)
        except IOFailedError as error:
            if error.errno not in UNSUPPORTED_ERRNOS:
                raise self._named(error, "fallocate", offset, length) from None
            if error.errno != errno.EINVAL:  # that is the range: a device wants whole blocks
                self._refused.add(mode)
            return False
        return True

    async def _extend(self, size: int) -> None:
        """Make the file at least ``size`` long, if the call that changed it has not done so."""
        if not self.is_device:
            await self.engine.call(_extend, self.fd, size)
        self.size = max(self.size, size)

    async def truncate(self, size: int, preallocation: Preallocation = Preallocation.OFF) -> None:
        """Cut or extend; FALLOC reserves what is new, FULL writes it. If growing fails the file is as long as before."""
        old = self.size
        if self.is_device:
            if size > old:
                raise UnsupportedError(f"a block device of {old} bytes cannot grow to {size}", filename=self.path)
            return
        with self._changing():
            try:
                if size > old and preallocation is Preallocation.FALLOC:
                    await self.engine.allocate(self.fd, 0, old, size - old)
                await self.engine.call(os.ftruncate, self.fd, size)
                if preallocation is Preallocation.FULL:
                    await self._write_new(old, size)
            except IOFailedError as error:
                if size > old:
                    with suppress(IOFailedError):
                        await self.engine.call(os.ftruncate, self.fd, old)
                raise self._named(error, "truncate", size, None) from None
            self.size = size

    async def _write_new(self, old: int, size: int) -> None:
        """Zeroes in all blocks from ``old`` to ``size``; the one that ``old`` is in has room already."""
        end = align_up(size, self.request_alignment)
        for start in range(align_up(old, self.request_alignment), end, MIB):
            await self.write(start, ZEROES[: min(MIB, end - start)])
        if end > size:
            await self.engine.call(os.ftruncate, self.fd, size)

    async def flush(self) -> None:
        """Make completed writes durable; nothing in cache mode "unsafe"."""
        if self._no_flush or self.read_only:
            return
        if self._failed_flush is not None:
            raise self._failed_flush
        try:
            await self.engine.sync(self.fd)
        except IOFailedError as error:
            self._failed_flush = self._named(error, "flush", None, None)
            raise self._failed_flush from None

    async def copy_range_to(self, target: File, source_offset: int, target_offset: int, length: int) -> bool:
        """Let the kernel copy between two files; False if it will not, and then anything may be in the target's range."""
        args = (self.fd, target.fd, source_offset, target_offset, length)
        try:
            with target._changing():  # noqa: SLF001 - same class
                if not await self.engine.call(_copy_range, *args, weight=length):
                    target._measure()  # noqa: SLF001 - same class
                    return False
        except IOFailedError as error:
            if error.errno in COPY_RANGE_ERRNOS:
                return False
            raise self._named(error, "copy", source_offset, length) from None
        target.size = max(target.size, target_offset + length)
        if target._write_through:  # noqa: SLF001 - same class
            await target.flush()
        return True

    # -- block status ------------------------------------------------------------------------------------------

    def try_block_status(self, offset: int, length: int) -> tuple[bool, int] | None:
        """The cached answer of ``block_status``, or None."""
        run = self._run
        if run is None or not run[1] <= offset < run[2]:
            return None
        return run[0], min(length, run[2] - offset)

    async def block_status(self, offset: int, length: int) -> tuple[bool, int]:
        """Whether data (else a hole) lie at ``offset``, and for how many bytes, at most ``length``."""
        known = self.try_block_status(offset, length)
        if known is not None:
            return known
        asked = self._run = (False, offset, offset)  # holds no byte; changes of the file put None in its place
        is_data, end = await self.engine.call(_seek, self.fd, offset, self.size)
        end = max(end, offset + 1)
        if self._run is asked:
            self._run = (is_data, offset, end)
        return is_data, min(length, end - offset)

    async def allocated_size(self) -> int | None:
        """Bytes that the file occupies, less than ``size`` if it has holes; None for a device."""
        return None if self.is_device else (await self.engine.call(os.fstat, self.fd)).st_blocks * SECTOR

    # -- helpers -----------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around whatever changes content or size: what was known of the file holds no longer."""
        self._run = None
        try:
            yield
        except BaseException:
            self._measure()
            raise
        finally:
            self._run = None

    def _measure(self) -> None:
        """A change failed or was cancelled, and may have happened in part or as a whole all the same."""
        if not self.is_device:
            self.size = os.fstat(self.fd).st_size

    def _named(self, error: IOFailedError, action: str, offset: int | None, length: int | None) -> IOFailedError:
        os_error = OSError(error.errno, os.strerror(error.errno or errno.EIO))
        return from_os_error(os_error, action, filename=self.path, offset=offset, length=length)


# -- blocking functions, run by worker threads -------------------------------------------------------------------


def _open(path: str, flags: int, is_direct: bool, opened: list[int]) -> tuple[int, bool, tuple[int, int]]:
    """Put the descriptor into ``opened``; answer size, whether it is a device, and alignment."""
    fd = os.open(path, flags, 0o644)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.ENOTBLK, os.strerror(errno.ENOTBLK))
        size = os.lseek(fd, 0, os.SEEK_END)
        alignment = direct.probe_alignment(fd) if is_direct else (1, 1)
    except BaseException:
        os.close(fd)
        raise
    opened.append(fd)
    return size, stat.S_ISBLK(mode), alignment


def _close(opened: list[int]) -> None:
    while opened:
        os.close(opened.pop())


def _extend(fd: int, size: int) -> None:
    """Not by ``ftruncate``: it would cut off what another thread writes further back in the same moment."""
    if os.fstat(fd).st_size < size:
        try:
            fallocate(fd, 0, size - 1, 1)
        except OSError as error:
            if error.errno not in UNSUPPORTED_ERRNOS:
                raise
            os.pwrite(fd, b"\0", size - 1)


def _seek(fd: int, offset: int, size: int) -> tuple[bool, int]:
    """``(is_data, end of the run)`` at ``offset``; all data where the file system cannot tell."""
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        return (False, size) if error.errno == errno.ENXIO else (True, size)
    if data > offset:
        return False, min(data, size)
    return True, min(os.lseek(fd, offset, os.SEEK_HOLE), size)


def _copy_range(source: int, target: int, source_offset: int, target_offset: int, length: int) -> bool:
    """False if the source ends before ``length``."""
    while length:
        count = os.copy_file_range(source, target, length, source_offset, target_offset)
        if not count:
            return False
        source_offset, target_offset, length = source_offset + count, target_offset + count, length - count
    return True
