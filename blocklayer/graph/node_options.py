"""Options that every node has, whatever its driver; they are taken out of the mapping before the driver sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from blocklayer.base.errors import OptionError
from blocklayer.base.modes import CacheMode, DetectZeroes, DiscardMode
from blocklayer.base.options import build, convert

if TYPE_CHECKING:
    from blocklayer.base.options import Options

NODE_NAME_MAX = 31
"""QEMU's limit, kept so that names are valid on both sides."""


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """What holds for a node.

    ``node_name``       its name in the graph, made up if empty
    ``read_only``       refuse writes, open children for reading
    ``auto_read_only``  fall back to read-only where writing is refused by the operating system
    ``cache``           see ``CacheMode``; children inherit it
    ``discard``         pass discards on, or drop them
    ``detect_zeroes``   turn writes of zeroes into write_zeroes
    ``force_share``     read although another process may be writing (no locks; read-only nodes)
    """

    node_name: str = ""
    read_only: bool = False
    auto_read_only: bool = False
    cache: CacheMode = CacheMode.WRITEBACK
    discard: DiscardMode = DiscardMode.UNMAP
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    force_share: bool = False

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if len(self.node_name) > NODE_NAME_MAX:
            raise OptionError(f"node name {self.node_name!r} is longer than {NODE_NAME_MAX} characters")
        if self.detect_zeroes is DetectZeroes.UNMAP and self.discard is DiscardMode.IGNORE:
            raise OptionError("detect-zeroes=unmap needs discard=unmap")
        if self.force_share and not self.read_only:
            raise OptionError("force-share needs read-only=on")


_KEYS = frozenset(NodeOptions.__dataclass_fields__)


def take_node_options(options: Options, inherited: NodeOptions) -> tuple[NodeOptions, dict[str, object]]:
    """Split ``options`` into the node's and the rest; what is not given comes from ``inherited`` (but for the name)."""
    own: dict[str, object] = {"read_only": inherited.read_only, "auto_read_only": inherited.auto_read_only}
    own |= {"cache": inherited.cache, "force_share": inherited.force_share, "discard": inherited.discard}
    rest: dict[str, object] = {}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name in _KEYS:
            own[name] = _cache_word(value) if name == "cache" else value
        else:
            rest[key] = value
    return build(NodeOptions, own), rest


def _cache_word(value: object) -> object:
    """QEMU's ``cache.direct`` and ``cache.no-flush`` as the word for both; a word passes through."""
    if not isinstance(value, dict):
        return value
    words = {str(key).replace("-", "_"): flag for key, flag in value.items()}
    if unknown := words.keys() - {"direct", "no_flush"}:
        raise OptionError(f"unknown option 'cache.{unknown.pop()}'; known: direct, no-flush")
    flags = {key: convert(f"cache.{key}", flag, bool) for key, flag in words.items()}
    if flags.get("no_flush"):
        if flags.get("direct"):
            raise OptionError("cache.direct and cache.no-flush cannot be combined")
        return CacheMode.UNSAFE
    return CacheMode.NONE if flags.get("direct") else CacheMode.WRITEBACK
