"""Options of qcow2 nodes: their names, defaults and the words that are refused."""

from __future__ import annotations

import pytest

from blocklayer.base.errors import OptionError
from blocklayer.base.options import build
from blocklayer.base.units import KIB, MIB
from blocklayer.drivers.qcow2.options import Qcow2Options


def test_defaults_are_qemus() -> None:
    options = build(Qcow2Options, {})
    assert options.l2_cache_size == 32 * MIB
    assert options.lazy_refcounts is None
    assert options.pass_discard_request is True


@pytest.mark.parametrize("spelling", ["l2-cache-size", "l2_cache_size"])
@pytest.mark.parametrize("size", ["64K", 64 * KIB, "65536"])
def test_sizes_are_numbers_or_words_and_names_take_both_dashes(spelling: str, size: object) -> None:
    assert build(Qcow2Options, {spelling: size}).l2_cache_size == 64 * KIB


@pytest.mark.parametrize(
    "options",
    [{"l2_cache_size": -1}, {"l2_cache_size": "much"}, {"lazy_refcounts": "perhaps"}, {"overlap_check": "all"}],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(OptionError, match=name):
        build(Qcow2Options, options)
