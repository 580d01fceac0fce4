"""faults: a filter that makes requests fail, wait or tear, by rules. What QEMU's blkdebug is for.

Options: ``rules``, a list of mappings with the fields of ``Rule`` (``{"event": "write", "nth": 3, "errno": 28}``).
In Python, ``driver.add(Rule(...))``, ``driver.remove(rule)`` and ``driver.hits(rule)`` work at run time.

The first rule that matches a request decides. A torn write stores its first sectors and then fails: what a power cut
leaves. A held request waits until ``release``: tests order interleavings with it.
"""

from __future__ import annotations

import errno as _errno
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import anyio

from blocklayer.aio.clock import Clock, MonotonicClock
from blocklayer.base.errors import OptionError, io_error
from blocklayer.base.modes import Preallocation, WriteFlags
from blocklayer.base.options import Options, build, convert
from blocklayer.base.units import SECTOR
from blocklayer.drivers.filter import FilterDriver

if TYPE_CHECKING:
    from typing import Self

    from blocklayer.base.extents import Extent
    from blocklayer.graph.child import Child
    from blocklayer.graph.opener import Opener

EVENTS: Final = ("read", "write", "write_zeroes", "discard", "flush", "truncate", "block_status", "any")


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """When and what.

    ``event``         one of ``EVENTS``
    ``offset``, ``length``  only requests that touch this range (``length`` None: to the end)
    ``nth``           only the n-th matching request (from 1); 0: each
    ``every``         only each n-th matching request; 0: each
    ``probability``   chance that a matching request is hit, drawn with the driver's ``seed``
    ``once``          the rule is spent after one hit
    ``errno``         fail with this; 0: do not fail
    ``delay_s``       wait first
    ``torn``          sectors of a write that are stored before it fails
    ``hold``          wait for ``release`` first
    """

    event: str = "any"
    offset: int = 0
    length: int | None = None
    nth: int = 0
    every: int = 0
    probability: float = 1.0
    once: bool = False
    errno: int = _errno.EIO
    delay_s: float = 0.0
    torn: int | None = None
    hold: bool = False

    def __post_init__(self) -> None:
        """Refuse what could never match."""
        if self.event not in EVENTS:
            raise OptionError(f"event {self.event!r} is none of {', '.join(EVENTS)}")
        if self.nth < 0 or self.every < 0 or not 0 <= self.probability <= 1:
            raise OptionError("nth and every are 0 or positive, probability is from 0 to 1")
        if self.delay_s < 0 or (self.torn or 0) < 0:
            raise OptionError("delay_s and torn are 0 or positive")
        if self.torn is not None and not self.errno:
            raise OptionError("a torn write fails: it needs an errno")

    def matches(self, event: str, offset: int, length: int) -> bool:
        """Whether a request is of the rule's kind and in its range."""
        if self.event not in ("any", event):
            return False
        end = None if self.length is None else self.offset + self.length
        return offset + max(length, 1) > self.offset and (end is None or offset < end)


def parse_rules(value: object) -> list[Rule]:
    """The option ``rules``: a list of ``Rule`` or of mappings with its fields."""
    if not isinstance(value, list | tuple) or not all(isinstance(rule, Rule | Mapping) for rule in value):
        raise OptionError(f"option 'rules' cannot be {value!r}; it takes a list of mappings")
    return [rule if isinstance(rule, Rule) else build(Rule, rule) for rule in value]


@dataclass(slots=True)
class _State:
    """What happened to a rule so far."""

    matches: int = 0
    hits: int = 0
    arrived: anyio.Event = field(default_factory=anyio.Event)
    released: anyio.Event = field(default_factory=anyio.Event)


class FaultsDriver(FilterDriver):
    """Applies rules, then passes on."""

    name = "faults"

    def __init__(self, file: Child, *, seed: int = 0, clock: Clock | None = None) -> None:
        """No rules yet."""
        super().__init__(file)
        self._rules: dict[Rule, _State] = {}
        self._random = random.Random(seed)  # noqa: S311 - repeatable, not secret
        self._clock = clock or MonotonicClock()

    @classmethod
    async def open(cls, options: Options, opener: Opener) -> Self:
        """Options ``rules`` and ``seed``."""
        if unknown := options.keys() - {"rules", "seed"}:
            raise OptionError(f"unknown option {min(unknown)!r}; known options: rules, seed")
        seed = convert("seed", options.get("seed", 0), int)
        rules = parse_rules(options.get("rules", ()))
        driver = cls(await opener.child("file"), seed=seed if isinstance(seed, int) else 0)
        for rule in rules:
            driver.add(rule)
        return driver

    def add(self, rule: Rule) -> Rule:
        """Apply ``rule`` from now on, after those that are there."""
        self._rules[rule] = _State()
        return rule

    def remove(self, rule: Rule) -> None:
        """Do not apply ``rule`` any more; whoever it holds is released."""
        self._rules.pop(rule).released.set()

    def clear(self) -> None:
        """Remove all rules."""
        for rule in tuple(self._rules):
            self.remove(rule)

    def hits(self, rule: Rule) -> int:
        """How many requests the rule has hit."""
        return self._rules[rule].hits

    async def wait_held(self, rule: Rule) -> None:
        """Return when a request is held by ``rule``."""
        await self._rules[rule].arrived.wait()

    def release(self, rule: Rule) -> None:
        """Let go of what ``rule`` holds, and hold nothing any more."""
        self._rules[rule].released.set()

    def _choose(self, event: str, offset: int, length: int) -> Rule | None:
        for rule, state in self._rules.items():
            if not rule.matches(event, offset, length) or (rule.once and state.hits):
                continue
            state.matches += 1
            if (rule.nth and state.matches != rule.nth) or (rule.every and state.matches % rule.every):
                continue
            if rule.probability < 1 and self._random.random() >= rule.probability:
                continue
            state.hits += 1
            return rule
        return None

    async def _apply(self, event: str, offset: int, length: int, data: memoryview | None = None) -> None:
        rule = self._choose(event, offset, length)
        if rule is None:
            return
        state = self._rules[rule]
        if rule.hold:
            state.arrived.set()
            await state.released.wait()
        if rule.delay_s:
            await self._clock.sleep(rule.delay_s)
        if rule.torn and data is not None:
            await self.file.write(offset, data[: rule.torn * SECTOR])
        if rule.errno:
            raise io_error(rule.errno, f"{event} (injected)", offset=offset, length=length)

    def try_read_into(self, offset: int, buffer: memoryview) -> bool:
        """Only while no rule could want the request."""
        if any(rule.matches("read", offset, len(buffer)) for rule in self._rules):
            return False
        return self.file.try_read_into(offset, buffer)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """See ``_apply``."""
        await self._apply("read", offset, len(buffer))
        await self.file.read_into(offset, buffer)

    async def write(self, offset: int, data: memoryview, flags: WriteFlags) -> None:
        """See ``_apply``."""
        await self._apply("write", offset, len(data), data)
        await self.file.write(offset, data, flags)

    async def write_compressed(self, offset: int, data: memoryview) -> None:
        """A kind of write."""
        await self._apply("write", offset, len(data))
        await self.file.write_compressed(offset, data)

    async def write_zeroes(self, offset: int, length: int, flags: WriteFlags) -> None:
        """See ``_apply``."""
        await self._apply("write_zeroes", offset, length)
        await self.file.write_zeroes(offset, length, flags)

    async def discard(self, offset: int, length: int) -> None:
        """See ``_apply``."""
        await self._apply("discard", offset, length)
        await self.file.discard(offset, length)

    def try_block_status(self, offset: int, length: int) -> Extent | None:
        """Only while no rule could want the request."""
        if any(rule.matches("block_status", offset, length) for rule in self._rules):
            return None
        return super().try_block_status(offset, length)

    async def block_status(self, offset: int, length: int) -> Extent:
        """See ``_apply``."""
        await self._apply("block_status", offset, length)
        return await self.file.block_status(offset, length)

    async def truncate(self, size: int, preallocation: Preallocation) -> None:
        """See ``_apply``."""
        await self._apply("truncate", size, 0)
        await self.file.truncate(size, preallocation)

    async def flush(self) -> None:
        """See ``_apply``."""
        await self._apply("flush", 0, 0)
        await self.file.flush()

    async def info(self) -> Mapping[str, object]:
        """How often each rule has hit."""
        return {"rules": [{"rule": repr(rule), "hits": state.hits} for rule, state in self._rules.items()]}
