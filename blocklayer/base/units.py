"""Sizes as people write them: ``64k``, ``1.5G``, ``4096``, and back.

Suffixes are powers of 1024 as in QEMU: b (bytes), k, M, G, T, P, E, in either case, with or without "iB".
"""

from __future__ import annotations

import re

from blocklayer.base.errors import OptionError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB
PIB = 1024 * TIB
EIB = 1024 * PIB

SECTOR = 512
"""The unit of virtual disks: sizes are multiples of it."""

SIZE_MAX = (1 << 63) - 512
"""Largest size of a node: offsets stay in a signed 64-bit integer."""

_FACTORS = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": TIB, "p": PIB, "e": EIB}
_SIZE = re.compile(r"\s*([0-9]{1,40}(?:\.[0-9]{1,40}(?=\s*[kmgtpe]))?)\s*(?:([kmgtpe])(?:i?b)?|b|)\s*", re.IGNORECASE)
"""A fraction needs a unit (half a byte is a mistake); 40 digits are more than any size has."""


def parse_size(text: str | int) -> int:
    """Bytes of ``text``; an ``int`` passes through. Raises ``OptionError`` if it is no size or larger than 2^63-512."""
    if isinstance(text, int):
        value = text
    else:
        match = _SIZE.fullmatch(text)
        if match is None:
            raise OptionError(f"{text!r} is not a size; write bytes or a number with k, M, G, T, P or E")
        whole, _, part = match[1].partition(".")
        value = int(whole + part) * _FACTORS[(match[2] or "").lower()] // 10 ** len(part)
    if not 0 <= value <= SIZE_MAX:
        raise OptionError(f"size {text!r} is outside 0 to {SIZE_MAX} bytes")
    return value


def format_size(size: int) -> str:
    """``size`` in the largest unit that keeps it at 1 or more, with three digits: ``1.5 GiB``, ``512 B`` (four: ``1000 B``)."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < KIB:
            return f"{_digits(value)} {unit}"
        value /= KIB
    return f"{_digits(value)} EiB"


def _digits(value: float) -> str:
    """Three digits, or the four of 1000 to 1024; never an exponent."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
