"""The reference page of drivers tells the options that there are, with the types and defaults that they have."""

from __future__ import annotations

import dataclasses
import enum
import re
import types
import typing
from pathlib import Path

import pytest

import blocklayer
from blocklayer.base.units import parse_size
from blocklayer.codec.qcow2.create import CreateOptions
from blocklayer.drivers import throttle
from blocklayer.drivers.faults import EVENTS, Rule
from blocklayer.drivers.file import FileOptions
from blocklayer.drivers.memory import MemoryOptions
from blocklayer.drivers.nbd.options import NbdOptions
from blocklayer.drivers.null import NullOptions
from blocklayer.drivers.qcow2.options import Qcow2Options
from blocklayer.drivers.raw import RawCreateOptions, RawOptions
from blocklayer.graph.node_options import NodeOptions

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "drivers.md").read_text()

TABLES = {
    ("Every node", "option"): NodeOptions,
    ("qcow2", "option"): Qcow2Options,
    ("qcow2", "option of `create`"): CreateOptions,
    ("raw", "option"): RawOptions,
    ("raw", "option of `create`"): RawCreateOptions,
    ("file", "option"): FileOptions,
    ("nbd", "option"): NbdOptions,
    ("memory", "option"): MemoryOptions,
    ("null-co", "option"): NullOptions,
    ("faults", "field of a rule"): Rule,
}


def rows(section, first_column):
    """Name, type and default of each row of a table, the backquotes taken off."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = text.split(f"| {first_column} |")[1].split("\n\n")[0]
    lines = [line.split("|") for line in table.splitlines()[2:]]
    return [tuple(cell.strip().replace("`", "") for cell in line[1:4]) for line in lines]


def type_word(hint):
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if issubclass(hint, enum.Enum):
        return ", ".join(member.value for member in hint)
    return {bool: "switch", int: "number", float: "fraction", str: "text"}[hint]


def same_default(cell, field):
    default = field.default
    if default is dataclasses.MISSING:
        return cell == "required"
    if default in (None, ""):
        return cell and not cell[0].isdigit() and cell not in ("required", "on", "off")
    if isinstance(default, bool):
        return cell == ("on" if default else "off")
    if isinstance(default, enum.Enum):
        return cell == default.value
    if isinstance(default, str | float):
        return cell == str(default)
    return parse_size(cell) == default


@pytest.mark.parametrize("table", TABLES, ids=" ".join)
def test_a_table_has_each_option_with_its_type_and_default(table):
    kind = TABLES[table]
    hints = typing.get_type_hints(kind)
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(kind)}
    found = rows(*table)
    assert [(name, word) for name, word, _ in found] == [(n, type_word(hints[f.name])) for n, f in fields.items()]
    assert [(name, cell) for name, _, cell in found if not same_default(cell, fields[name])] == []


def test_the_limits_of_throttling_are_all_there():
    named = [name for cell, _, _ in rows("throttle", "option") for name in cell.split(", ")]
    assert named == [*throttle.LIMITS, "each of these with -max", "each of these with -max-length", "iops-size"]


def test_each_event_that_can_fail_is_named():
    row = next(line for line in PAGE.splitlines() if line.startswith("| `event`"))
    assert set(re.findall(r"`(\w+)`", row)) == {"event", *EVENTS}


def test_each_built_in_driver_has_a_section_and_a_line_in_the_list():
    sections = set(re.findall(r"^## (\S+)$", PAGE, re.MULTILINE))
    listed = set(re.findall(r"^\| \[`(\S+)`\]\(#\S+\)", PAGE, re.MULTILINE))
    assert sections == listed == set(blocklayer.BUILT_IN_DRIVERS)


def test_formats_tell_the_endings_that_mean_them():
    for driver in blocklayer.BUILT_IN_DRIVERS.values():
        for ending in driver.suffixes:
            assert (
                f"A path that ends in `{ending}` is opened so"
                in PAGE.split(f"\n## {driver.name}\n")[1].split("\n## ")[0]
            )
