"""Options that every node has: spelled as QEMU or Python spells them, inherited, and free of contradictions."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import OptionError
from blocklayer.base.modes import CacheMode, DetectZeroes, DiscardMode
from blocklayer.graph.node_options import NodeOptions, take_node_options


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, NodeOptions()),
        ({"node-name": "disk"}, NodeOptions(node_name="disk")),
        ({"node_name": "disk"}, NodeOptions(node_name="disk")),
        ({"read-only": "on"}, NodeOptions(read_only=True)),
        ({"read_only": True, "auto-read-only": "yes"}, NodeOptions(read_only=True, auto_read_only=True)),
        ({"cache": "none"}, NodeOptions(cache=CacheMode.NONE)),
        ({"cache": CacheMode.UNSAFE}, NodeOptions(cache=CacheMode.UNSAFE)),
        ({"cache": {"direct": "on"}}, NodeOptions(cache=CacheMode.NONE)),
        ({"cache": {"direct": True, "no-flush": False}}, NodeOptions(cache=CacheMode.NONE)),
        ({"cache": {"no-flush": "on"}}, NodeOptions(cache=CacheMode.UNSAFE)),
        ({"cache": {}}, NodeOptions(cache=CacheMode.WRITEBACK)),
        ({"discard": "ignore"}, NodeOptions(discard=DiscardMode.IGNORE)),
        ({"detect-zeroes": "unmap"}, NodeOptions(detect_zeroes=DetectZeroes.UNMAP)),
        ({"force-share": "on", "read-only": "on"}, NodeOptions(force_share=True, read_only=True)),
    ],
)
def test_node_options_are_understood_in_either_spelling(options, expected: NodeOptions) -> None:
    assert take_node_options(options, NodeOptions()) == (expected, {})


def test_what_is_not_a_nodes_is_left_for_the_driver_word_for_word() -> None:
    options = {"read-only": "on", "l2-cache-size": "1M", "data_file": {"driver": "file"}, "driver": "qcow2"}
    _, rest = take_node_options(options, NodeOptions())
    assert rest == {"l2-cache-size": "1M", "data_file": {"driver": "file"}, "driver": "qcow2"}


def test_a_child_inherits_all_but_the_name_and_zero_detection() -> None:
    parent = NodeOptions(
        node_name="top",
        read_only=True,
        auto_read_only=True,
        cache=CacheMode.NONE,
        discard=DiscardMode.UNMAP,
        detect_zeroes=DetectZeroes.UNMAP,
        force_share=True,
    )
    child, _ = take_node_options({}, parent)
    assert child == NodeOptions(
        read_only=True, auto_read_only=True, cache=CacheMode.NONE, discard=DiscardMode.UNMAP, force_share=True
    )


def test_what_a_child_is_told_itself_wins() -> None:
    parent = NodeOptions(read_only=True, cache=CacheMode.NONE, discard=DiscardMode.IGNORE)
    child, _ = take_node_options({"read-only": "off", "cache": "writeback", "discard": "unmap"}, parent)
    assert child == NodeOptions()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"node-name": "x" * 32}, f"node name '{'x' * 32}' is longer than 31 characters"),
        ({"detect-zeroes": "unmap", "discard": "ignore"}, "detect-zeroes=unmap needs discard=unmap"),
        ({"force-share": "on"}, "force-share needs read-only=on"),
        ({"read-only": "maybe"}, "option 'read_only' cannot be 'maybe'; it takes on or off"),
        (
            {"cache": "fast"},
            "option 'cache' cannot be 'fast'; it takes one of writeback, writethrough, none, directsync, unsafe",
        ),
        ({"cache": {"size": "1M"}}, "unknown option 'cache.size'; known: direct, no-flush"),
        ({"cache": {"direct": "on", "no-flush": "on"}}, "cache.direct and cache.no-flush cannot be combined"),
        ({"cache": {"direct": "perhaps"}}, "option 'cache.direct' cannot be 'perhaps'; it takes on or off"),
    ],
)
def test_contradictions_and_unknown_words_are_refused(options, text: str) -> None:
    with pytest.raises(OptionError) as raised:
        take_node_options(options, NodeOptions())
    assert str(raised.value) == text


def test_a_name_of_31_characters_is_the_longest() -> None:
    assert NodeOptions(node_name="x" * 31).node_name == "x" * 31
