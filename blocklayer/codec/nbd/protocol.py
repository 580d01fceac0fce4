"""The numbers of the NBD protocol, and the limits that both of our sides keep.

Layer ``codec``: constants only. All numbers on the wire are big-endian; all texts are UTF-8 without NUL.

    handshake     greeting, client flags, then options, each with one or more replies, until a final one
    transmission  requests, each with one simple reply or with chunks, the last of which is flagged

Three shapes of transmission, of which the handshake chooses one:

    ========== ============ =========================== ==========================================
    shape      request      reply                       negotiated by
    ========== ============ =========================== ==========================================
    simple     compact, 28  simple, 16                  nothing
    structured compact, 28  structured 20, simple 16    STRUCTURED_REPLY
    extended   extended, 32 extended, 32                EXTENDED_HEADERS, which implies structured
    ========== ============ =========================== ==========================================

Each limit bounds memory or work that the other side could otherwise demand; the reason stands at each.
Source: NBD, "Values"; the ``qemu:`` contexts are from QEMU's docs/interop/nbd.
"""

from __future__ import annotations

import enum
from typing import Final

from blocklayer.base.units import MIB

INIT_MAGIC: Final = 0x4E42444D41474943
"""``NBDMAGIC``: the first eight bytes of every server."""

OPTION_MAGIC: Final = 0x49484156454F5054
"""``IHAVEOPT``: in the greeting of newstyle servers, and before each option."""

OLDSTYLE_MAGIC: Final = 0x00420281861253
"""In the greeting of servers from before 2011, which have no handshake."""

OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

DEFAULT_PORT: Final = 10809

# -- limits ----------------------------------------------------------------------------------------------------

NAME_MAX: Final = 4096
"""Bytes of the longest text of the protocol: names, descriptions, queries, messages."""

REQUEST_MAX: Final = 32 * MIB
"""Bytes of the longest read and write. No side may take one of this size for an attack, and every side can send it."""

CONTEXTS_MAX: Final = 64
"""Metadata contexts of one connection. Each costs a pass over the disk's map; a backup needs two or three."""

OPTION_MAX: Final = 8 + NAME_MAX + CONTEXTS_MAX * (4 + NAME_MAX)
"""Bytes of the largest option that a server reads, about 260 KiB: as many queries as there can be contexts, each as
long as a text can be. Every legal INFO and GO is smaller, even one that lists all 65,535 kinds of information."""

OPTION_REPLY_MAX: Final = 4 + 2 * NAME_MAX
"""Bytes of the largest reply that a client reads: an export's name and its description."""

OPTION_REPLIES_MAX: Final = 1024
"""Replies to one option that a client reads; those to LIST have their own limit."""

EXPORTS_MAX: Final = 10_000
"""Exports that a client lets a server list, the number that libnbd takes too."""

OPTION_REPLIES_BYTES_MAX: Final = 8 * MIB
"""Bytes of all replies to one option: ten thousand exports with names and descriptions of sane length."""

OPTIONS_MAX: Final = 2048
"""Options in one handshake. ``qemu-nbd --list`` sends two for each export: this lists a thousand of them."""

SKIPPED_MAX: Final = REQUEST_MAX
"""Bytes of unknown and oversized options that a server skips in one handshake, before it hangs up: one option may
announce 4 GiB, and skipping them costs the server as much time as the client."""

EXTENTS_MAX: Final = 1 << 20
"""Extents in one chunk of block status that a client reads: the specification's advice to servers."""

EXTENTS_SENT_MAX: Final = MIB // 16
"""Extents in one chunk that a server sends: a payload of at most 1 MiB, whichever shape it has."""

MINIMUM_BLOCK_MAX: Final = 1 << 16
"""The largest minimum block size that may be advertised."""

UNLIMITED: Final = 0xFFFFFFFF
"""As a maximum block size: no limit of its own."""

# -- handshake -------------------------------------------------------------------------------------------------


class HandshakeFlags(enum.IntFlag):
    """Sent by the server in its greeting and repeated by the client, as far as it agrees."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class TransmissionFlags(enum.IntFlag):
    """What an export can do. 16 bits; clients ignore the ones that they do not know."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Option(enum.IntEnum):
    """What a client asks during the handshake. 4 was withdrawn."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


OPTION_ERROR: Final = 1 << 31
"""Set in every option reply that is an error, also in ones that are not known here. Its data is a text for people."""


class OptionReply(enum.IntEnum):
    """What a server answers to an option. ACK and the errors are final."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = OPTION_ERROR + 1
    ERR_POLICY = OPTION_ERROR + 2
    ERR_INVALID = OPTION_ERROR + 3
    ERR_PLATFORM = OPTION_ERROR + 4
    ERR_TLS_REQD = OPTION_ERROR + 5
    ERR_UNKNOWN = OPTION_ERROR + 6
    ERR_SHUTDOWN = OPTION_ERROR + 7
    ERR_BLOCK_SIZE_REQD = OPTION_ERROR + 8
    ERR_TOO_BIG = OPTION_ERROR + 9
    ERR_EXT_HEADER_REQD = OPTION_ERROR + 10


class Info(enum.IntEnum):
    """Kinds of information in the replies to INFO and GO. Unknown ones are ignored by both sides."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TlsMode(enum.Enum):
    """Whether a side encrypts: never, when the client asks for it (servers only), or always."""

    OFF = "off"
    ALLOW = "allow"
    REQUIRE = "require"


# -- transmission ----------------------------------------------------------------------------------------------


class Command(enum.IntEnum):
    """What a request asks for."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlags(enum.IntFlag):
    """How a request is to be done. PAYLOAD_LEN: the header's length counts bytes that follow, not bytes of the disk."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


COMMAND_FLAGS: Final = {
    Command.READ: CommandFlags.FUA | CommandFlags.DF,
    Command.WRITE: CommandFlags.FUA | CommandFlags.PAYLOAD_LEN,
    Command.DISC: CommandFlags.FUA,
    Command.FLUSH: CommandFlags.FUA,
    Command.TRIM: CommandFlags.FUA,
    Command.CACHE: CommandFlags.FUA,
    Command.WRITE_ZEROES: CommandFlags.FUA | CommandFlags.NO_HOLE | CommandFlags.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlags.FUA | CommandFlags.REQ_ONE | CommandFlags.PAYLOAD_LEN,
}
"""Flags that a command may carry; others are EINVAL. FUA is taken on all of them: clients set it so. PAYLOAD_LEN is
for extended requests only, and on BLOCK_STATUS only where the export has BLOCK_STATUS_PAYLOAD."""


class ReplyType(enum.IntEnum):
    """What a chunk holds. Types with bit 15 set are errors, also ones that are not known here."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


REPLY_ERROR: Final = 1 << 15
"""Set in the type of every chunk that is an error."""


class ReplyFlags(enum.IntFlag):
    """Of a chunk. DONE: no further chunk answers this request."""

    DONE = 1 << 0


class NbdErrno(enum.IntEnum):
    """Errors on the wire: Linux's numbers, on every system. Clients take others for EINVAL."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


# -- metadata contexts -----------------------------------------------------------------------------------------

BASE_ALLOCATION: Final = "base:allocation"
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"
DIRTY_BITMAP_PREFIX: Final = "qemu:dirty-bitmap:"


class AllocationState(enum.IntFlag):
    """Status flags of ``base:allocation``; other bits are ignored."""

    HOLE = 1 << 0
    ZERO = 1 << 1


class DirtyState(enum.IntFlag):
    """Status flags of ``qemu:dirty-bitmap:``."""

    DIRTY = 1 << 0


_KNOWN_FLAGS: Final = sum(TransmissionFlags)


def effective_flags(flags: TransmissionFlags, *, structured: bool, extended: bool, contexts: bool) -> TransmissionFlags:
    """An export's flags as far as they mean something on one connection.

    DF needs chunks, FAST_ZERO needs WRITE_ZEROES, and a filter of contexts needs extended requests and contexts;
    unknown flags need someone who knows them. Servers send no more than this, and clients believe no more than this.
    Source: NBD, "Transmission flags".
    """
    flags = TransmissionFlags(flags & _KNOWN_FLAGS)
    if not structured:
        flags &= ~TransmissionFlags.SEND_DF
    if not (extended and contexts):
        flags &= ~TransmissionFlags.BLOCK_STATUS_PAYLOAD
    if not flags & TransmissionFlags.SEND_WRITE_ZEROES:
        flags &= ~TransmissionFlags.SEND_FAST_ZERO
    return flags
