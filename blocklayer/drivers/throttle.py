"""throttle: a filter that bounds bytes and requests per second, with bursts (QEMU's throttling limits).

Options, each 0 (no limit) by default: ``bps-total``, ``bps-read``, ``bps-write``, ``iops-total``, ``iops-read``,
``iops-write``; each with ``-max`` (burst rate) and ``-max-length`` (seconds of burst); ``iops-size``: a request of more
bytes than this counts as several. A total limit excludes read and write limits of the same kind.
Requests of one direction pass in the order in which they came.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import anyio

from blocklayer.aio.clock import Clock, MonotonicClock, sleep_unless
from blocklayer.aio.leaky_bucket import BucketLimits, LeakyBucket
from blocklayer.base.errors import OptionError
from blocklayer.base.modes import WriteFlags
from blocklayer.base.options import Options, convert
from blocklayer.drivers.filter import FilterDriver

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from blocklayer.graph.child import Child
    from blocklayer.graph.opener import Opener

LIMITS: Final = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")
_KEYS: Final = {*LIMITS, *(f"{name}-max" for name in LIMITS), *(f"{name}-max-length" for name in LIMITS), "iops-size"}


def parse_limits(options: Options) -> tuple[dict[str, BucketLimits], int]:
    """The limit of each bucket, and ``iops-size``. Raises ``OptionError``."""
    values: dict[str, int] = {}
    for key, raw in options.items():
        name = key.replace("_", "-")
        if name not in _KEYS:
            raise OptionError(f"unknown option {key!r}; known options: {', '.join(sorted(_KEYS))}")
        value = convert(key, raw, int)
        values[name] = value if isinstance(value, int) else 0
    limits = {name: _bucket(name, values) for name in LIMITS}
    for kind in ("bps", "iops"):
        if limits[f"{kind}-total"].average and (limits[f"{kind}-read"].average or limits[f"{kind}-write"].average):
            raise OptionError(f"{kind}-total cannot be combined with {kind}-read or {kind}-write")
    iops_size = values.get("iops-size", 0)
    if iops_size and not any(limits[f"iops-{of}"].average for of in ("total", "read", "write")):
        raise OptionError("iops-size needs a limit of requests: iops-total, iops-read or iops-write")
    return limits, iops_size


def _bucket(name: str, values: Mapping[str, int]) -> BucketLimits:
    try:
        return BucketLimits(values.get(name, 0), values.get(f"{name}-max", 0), values.get(f"{name}-max-length", 1))
    except OptionError as error:
        raise OptionError(f"{name}: {error.message}") from None


class ThrottleDriver(FilterDriver):
    """Makes requests wait."""

    name = "throttle"

    def __init__(
        self, file: Child, limits: Mapping[str, BucketLimits], iops_size: int, *, clock: Clock | None = None
    ) -> None:
        """``clock`` tells the time; tests pass their own."""
        super().__init__(file)
        self._buckets = {name: LeakyBucket(limit) for name, limit in limits.items()}
        self._iops_size = iops_size
        self._clock = clock or MonotonicClock()
        self._changed = anyio.Event()
        self._turns = {"read": asyncio.Lock(), "write": asyncio.Lock()}

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """See the module's text."""
        limits, iops_size = parse_limits(options)
        return cls(await opener.child("file"), limits, iops_size)

    def set_limits(self, options: Options) -> None:
        """Other limits from now on, also for requests that wait; what is not named is not limited."""
        limits, self._iops_size = parse_limits(options)
        for name, bucket in self._buckets.items():
            bucket.change(limits[name], self._clock.now())
        self._changed.set()
        self._changed = anyio.Event()

    def _delay(self, direction: str) -> float:
        now = self._clock.now()
        return max(self._buckets[f"{kind}-{of}"].delay(now) for kind in ("bps", "iops") for of in ("total", direction))

    def _pour(self, direction: str, length: int) -> None:
        now = self._clock.now()
        requests = max(1.0, length / self._iops_size) if self._iops_size else 1.0
        for of in ("total", direction):
            self._buckets[f"bps-{of}"].pour(length, now)
            self._buckets[f"iops-{of}"].pour(requests, now)

    async def _wait(self, direction: str, length: int) -> None:
        async with self._turns[direction]:
            while (delay := self._delay(direction)) > 0:
                await sleep_unless(self._changed, self._clock, delay)
            self._pour(direction, length)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Only if the budget allows it at once, and nobody waits."""
        if self._turns["read"].locked() or self._delay("read") > 0 or not self.file.try_read_into(offset, buffer):
            return False
        self._pour("read", len(buffer))
        return True

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Wait for the budget, then pass on."""
        await self._wait("read", len(buffer))
        await self.file.read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """Wait for the budget, then pass on."""
        await self._wait("write", len(data))
        await self.file.write(offset, data, flags)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """Wait for the budget, then pass on."""
        await self._wait("write", len(data))
        await self.file.write_compressed(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """Counts like a write of the same length."""
        await self._wait("write", length)
        await self.file.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        """Counts like a write of the same length."""
        await self._wait("write", length)
        await self.file.discard(offset, length)
