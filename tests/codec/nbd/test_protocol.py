"""The numbers are those of the specification, and flags mean what was agreed on."""

from __future__ import annotations

import pytest

from blocklayer.codec.nbd import protocol
from blocklayer.codec.nbd.protocol import (
    COMMAND_FLAGS,
    CONTEXTS_MAX,
    EXTENTS_MAX,
    EXTENTS_SENT_MAX,
    NAME_MAX,
    OPTION_MAX,
    Command,
    CommandFlags,
    Info,
    NbdErrno,
    Option,
    OptionReply,
    ReplyType,
    TransmissionFlags,
    effective_flags,
)

F = TransmissionFlags


def test_magics_spell_what_they_spell() -> None:
    assert protocol.INIT_MAGIC.to_bytes(8, "big") == b"NBDMAGIC"
    assert protocol.OPTION_MAGIC.to_bytes(8, "big") == b"IHAVEOPT"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("OLDSTYLE_MAGIC", 0x00420281861253),
        ("OPTION_REPLY_MAGIC", 0x3E889045565A9),
        ("REQUEST_MAGIC", 0x25609513),
        ("EXTENDED_REQUEST_MAGIC", 0x21E41C71),
        ("SIMPLE_REPLY_MAGIC", 0x67446698),
        ("STRUCTURED_REPLY_MAGIC", 0x668E33EF),
        ("EXTENDED_REPLY_MAGIC", 0x6E8A278C),
        ("DEFAULT_PORT", 10809),
        ("REQUEST_MAX", 33_554_432),
        ("NAME_MAX", 4096),
    ],
)
def test_a_number_of_the_specification(name: str, expected: int) -> None:
    assert getattr(protocol, name) == expected


def test_enumerations_have_the_values_of_the_specification() -> None:
    assert [(option.name, option) for option in Option] == [
        ("EXPORT_NAME", 1), ("ABORT", 2), ("LIST", 3), ("STARTTLS", 5), ("INFO", 6), ("GO", 7), ("STRUCTURED_REPLY", 8),
        ("LIST_META_CONTEXT", 9), ("SET_META_CONTEXT", 10), ("EXTENDED_HEADERS", 11),
    ]  # fmt: skip
    assert [reply - 2**31 for reply in OptionReply if reply & 2**31] == list(range(1, 11))
    assert [reply for reply in OptionReply if reply < 2**31] == [1, 2, 3, 4]
    assert list(Info) == [0, 1, 2, 3]
    assert [command.name for command in Command] == [
        "READ", "WRITE", "DISC", "FLUSH", "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS", "RESIZE",
    ]  # fmt: skip
    assert list(Command) == list(range(9))
    assert list(ReplyType) == [0, 1, 2, 5, 6, 0x8001, 0x8002]
    assert list(CommandFlags) == [1, 2, 4, 8, 16, 32]
    assert list(TransmissionFlags) == [1 << bit for bit in range(13)]
    assert {error.name: int(error) for error in NbdErrno} == {
        "EPERM": 1, "EIO": 5, "ENOMEM": 12, "EINVAL": 22, "ENOSPC": 28, "EOVERFLOW": 75, "ENOTSUP": 95,
        "ESHUTDOWN": 108,
    }  # fmt: skip


def test_the_largest_option_has_room_for_every_context_and_for_every_kind_of_information() -> None:
    assert OPTION_MAX >= 4 + NAME_MAX + 4 + CONTEXTS_MAX * (4 + NAME_MAX)
    assert OPTION_MAX >= 4 + NAME_MAX + 2 + 2 * 65535


def test_what_is_sent_is_less_than_what_is_accepted() -> None:
    assert EXTENTS_SENT_MAX <= EXTENTS_MAX
    assert EXTENTS_SENT_MAX * 16 <= protocol.REQUEST_MAX


def test_every_command_takes_fua_and_only_writes_and_filters_have_payloads() -> None:
    assert all(flags & CommandFlags.FUA for flags in COMMAND_FLAGS.values())
    with_payload = {command for command, flags in COMMAND_FLAGS.items() if flags & CommandFlags.PAYLOAD_LEN}
    assert with_payload == {Command.WRITE, Command.BLOCK_STATUS}


@pytest.mark.parametrize(
    ("flags", "agreed", "expected"),
    [
        (F.SEND_DF, {}, F(0)),
        (F.SEND_DF, {"structured": True}, F.SEND_DF),
        (F.BLOCK_STATUS_PAYLOAD, {"structured": True, "extended": True}, F(0)),
        (F.BLOCK_STATUS_PAYLOAD, {"structured": True, "contexts": True}, F(0)),
        (F.BLOCK_STATUS_PAYLOAD, {"extended": True, "contexts": True}, F.BLOCK_STATUS_PAYLOAD),
        (F.SEND_FAST_ZERO, {}, F(0)),
        (F.SEND_FAST_ZERO | F.SEND_WRITE_ZEROES, {}, F.SEND_FAST_ZERO | F.SEND_WRITE_ZEROES),
        (F.HAS_FLAGS | 0x8000, {}, F.HAS_FLAGS),
        (F.READ_ONLY | F.CAN_MULTI_CONN, {}, F.READ_ONLY | F.CAN_MULTI_CONN),
    ],
)
def test_flags_that_mean_nothing_on_a_connection_are_not_shown(flags: F, agreed: dict, expected: F) -> None:
    assert effective_flags(flags, **{"structured": False, "extended": False, "contexts": False, **agreed}) == expected
