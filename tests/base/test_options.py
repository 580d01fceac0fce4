"""Options in both spellings, and their way into a dataclass; every error names the option and what was expected."""

from __future__ import annotations

import enum
import json
import subprocess
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocklayer.base.errors import OptionError
from blocklayer.base.options import DEPTH_MAX, build, convert, nest, parse_json, parse_keyval, parse_options
from tests.helpers.peers import needs

NAMES = st.text("abz019_-", min_size=1, max_size=4)
TREES = st.recursive(
    st.text(st.characters(codec="utf-8"), max_size=6),
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3),
    max_leaves=8,
)


def error_of(function, *arguments):
    with pytest.raises(OptionError) as caught:
        function(*arguments)
    return str(caught.value)


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("driver=null", {"driver": "null"}),
        ("driver=raw,size=1M", {"driver": "raw", "size": "1M"}),
        ("file.driver=file,file.filename=a.raw", {"file": {"driver": "file", "filename": "a.raw"}}),
        ("read-only", {"read-only": "on"}),
        ("read-only,driver=raw", {"read-only": "on", "driver": "raw"}),
        ("filename=a=b", {"filename": "a=b"}),
        ("filename=", {"filename": ""}),
        ("filename=a,,b", {"filename": "a,b"}),
        ("filename=a,,", {"filename": "a,"}),
        ("filename=,,a", {"filename": ",a"}),
        ("filename=a,,,driver=raw", {"filename": "a,", "driver": "raw"}),
        ("filename=,,,,,driver=raw", {"filename": ",,", "driver": "raw"}),
        ("size=1,size=2", {"size": "2"}),
        ("filename=a.b/c.d", {"filename": "a.b/c.d"}),
    ],
)
def test_keys_and_values_stand_in_one_line(text, expected):
    assert parse_options(text) == expected


@given(st.dictionaries(NAMES, TREES, min_size=1, max_size=4))
def test_every_tree_of_texts_can_be_written_in_one_line(tree):
    line = ",".join(f"{name}={value.replace(',', ',,')}" for name, value in leaves(tree))
    assert parse_options(line) == tree


@given(st.dictionaries(NAMES, TREES, max_size=4))
def test_every_tree_can_be_written_as_json(tree):
    assert parse_options(f"json:{json.dumps(tree)}") == tree


@given(st.dictionaries(NAMES, TREES, max_size=4))
def test_dotted_keys_in_json_are_groups_too(tree):
    assert parse_options(f"json:{json.dumps(dict(leaves(tree)))}") == tree


def test_numbers_and_switches_keep_their_type_in_json():
    assert parse_json('json:{"size": 1048576, "read-only": true, "x": null, "y": 0.5}') == {
        "size": 1048576,
        "read-only": True,
        "x": None,
        "y": 0.5,
    }


@pytest.mark.parametrize(
    "text", ["", ",", "=x", "driver=raw,", ",driver=raw", "a b=c", "a..b=1", ".a=1", "a.=1", "\u00e4=1"]
)
def test_a_part_without_a_key_is_refused(text):
    part = next(part for part in text.split(",") if part in {"", text} or part.startswith("="))
    assert error_of(parse_options, text) == f"{part!r} in {text!r} is not key=value"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("json:", "not a json: name: Expecting value: line 1 column 1 (char 0)"),
        ('json:{"a": }', "not a json: name: Expecting value: line 1 column 7 (char 6)"),
        ('json:{"a": 1} x', "not a json: name: Extra data: line 1 column 10 (char 9)"),
        ('json:{"a": 1, "a": 1}', "not a json: name: option 'a' is given twice"),
        ('json:{"f": {"a": 1, "a": 2}}', "not a json: name: option 'a' is given twice"),
        ("json:[]", "a json: name must hold an object"),
        ('json:"text"', "a json: name must hold an object"),
        ("json:null", "a json: name must hold an object"),
    ],
)
def test_what_is_no_json_object_is_refused(text, expected):
    assert error_of(parse_options, text) == expected


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({}, {}),
        ({"a.b": 1, "a.c": 2, "d": 3}, {"a": {"b": 1, "c": 2}, "d": 3}),
        ({"a": {"b": 1}, "a.c": 2}, {"a": {"b": 1, "c": 2}}),
        ({"a.c": 2, "a": {"b": 1}}, {"a": {"b": 1, "c": 2}}),
        ({"a": {"b.c": 1}, "a.b.d": 2}, {"a": {"b": {"c": 1, "d": 2}}}),
        ({"a": {}}, {"a": {}}),
    ],
)
def test_dotted_keys_become_groups_and_groups_merge(flat, expected):
    assert nest(flat) == expected


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"a": 1, "a.b": 2}, "option 'a.b' needs 'a' to be a group, but it has a value of its own"),
        ({"a.b": 2, "a": 1}, "option 'a' is given twice"),
        ({"a": {"b": 1}, "a.b": 2}, "option 'a.b' is given twice"),
        ({"a.b": 2, "a": {"b": 1}}, "option 'a.b' is given twice"),
        ({"a": {"b": {"c": 1}}, "a.b.c": 2}, "option 'a.b.c' is given twice"),
    ],
)
def test_a_value_and_a_group_of_one_name_contradict_each_other(flat, expected):
    assert error_of(nest, flat) == expected


def test_nesting_does_not_change_what_it_is_given():
    flat = {"a": {"b": 1}, "a.c": 2}
    nest(flat)
    assert flat == {"a": {"b": 1}, "a.c": 2}


def deep(levels, mixed):
    """Nested ``levels`` deep: by dots alone, by objects alone, or by both."""
    if mixed == "dots":
        return ".".join(["a"] * levels) + "=x"
    if mixed == "objects":
        return "json:" + '{"a":' * levels + '"x"' + "}" * levels
    return "json:" + '{"a.a":' * (levels // 2) + '"x"' + "}" * (levels // 2)


@pytest.mark.parametrize("spelling", ["dots", "objects", "both"])
def test_nesting_is_bounded_in_every_spelling(spelling):
    tree, depth = parse_options(deep(DEPTH_MAX, spelling)), 0
    while isinstance(tree, dict):
        tree, depth = tree["a"], depth + 1
    assert (tree, depth) == ("x", DEPTH_MAX)
    assert error_of(parse_options, deep(DEPTH_MAX + 2, spelling)).endswith("... is nested deeper than 256")


def test_json_that_is_deeper_than_any_parser_bears_is_an_option_error():
    assert error_of(parse_options, deep(100_000, "objects")).startswith("not a json: name: ")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Sample:
    size: int
    read_only: bool = False
    colour: Colour = Colour.RED
    factor: float = 1.0
    name: str | None = None
    length: int | None = None
    child: object = None
    tags: tuple[str, ...] = field(default_factory=tuple)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 512}, Sample(512)),
        ({"size": "64k"}, Sample(65536)),
        ({"size": 0, "read-only": "on"}, Sample(0, read_only=True)),
        ({"size": 0, "read_only": False}, Sample(0)),
        ({"size": 0, "colour": "blue"}, Sample(0, colour=Colour.BLUE)),
        ({"size": 0, "colour": Colour.BLUE}, Sample(0, colour=Colour.BLUE)),
        ({"size": 0, "factor": "0.5"}, Sample(0, factor=0.5)),
        ({"size": 0, "factor": 2}, Sample(0, factor=2.0)),
        ({"size": 0, "name": "a", "length": "1k"}, Sample(0, name="a", length=1024)),
        ({"size": 0, "name": None, "length": None}, Sample(0)),
        ({"size": 0, "child": {"driver": "null"}}, Sample(0, child={"driver": "null"})),
    ],
)
def test_options_become_what_the_fields_hold(options, expected):
    assert build(Sample, options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "option 'size' is required"),
        (
            {"size": 1, "sise": 2},
            "unknown option 'sise'; known options: child, colour, factor, length, name, read_only, size, tags",
        ),
        ({"size": 1, "read-only": "on", "read_only": "off"}, "option 'read_only' is given twice"),
        ({"size": "big"}, "option 'size' cannot be 'big'; it takes a number or size"),
        ({"size": "-1"}, "option 'size' cannot be '-1'; it takes a number or size"),
        ({"size": -1}, "option 'size' cannot be -1; it takes a number or size"),
        ({"size": 1 << 63}, "option 'size' cannot be 9223372036854775808; it takes a number or size"),
        ({"size": True}, "option 'size' cannot be True; it takes a number or size"),
        ({"size": 1.0}, "option 'size' cannot be 1.0; it takes a number or size"),
        ({"size": None}, "option 'size' cannot be None; it takes a number or size"),
        ({"size": {"a": "1"}}, "option 'size' cannot be {'a': '1'}; it takes a number or size"),
        ({"read-only": "maybe"}, "option 'read-only' cannot be 'maybe'; it takes on or off"),
        ({"read-only": 1}, "option 'read-only' cannot be 1; it takes on or off"),
        ({"read-only": {}}, "option 'read-only' cannot be {}; it takes on or off"),
        ({"colour": "green"}, "option 'colour' cannot be 'green'; it takes one of red, blue"),
        ({"colour": []}, "option 'colour' cannot be []; it takes one of red, blue"),
        ({"factor": "fast"}, "option 'factor' cannot be 'fast'; it takes a number"),
        ({"factor": True}, "option 'factor' cannot be True; it takes a number"),
        ({"factor": "nan"}, "option 'factor' cannot be 'nan'; it takes a number"),
        ({"factor": float("nan")}, "option 'factor' cannot be nan; it takes a number"),
        ({"factor": "1e999"}, "option 'factor' cannot be '1e999'; it takes a number"),
        ({"factor": 10**400}, f"option 'factor' cannot be {10**400}; it takes a number"),
        ({"name": 5}, "option 'name' cannot be 5; it takes text"),
        ({"length": "x"}, "option 'length' cannot be 'x'; it takes a number or size"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_option_is_refused_by_its_name_and_what_it_takes(options, expected):
    assert error_of(build, Sample, options) == expected


def test_a_dataclass_without_fields_takes_no_options():
    @dataclass
    class Nothing:
        pass

    assert build(Nothing, {}) == Nothing()
    assert error_of(build, Nothing, {"size": 1}) == "unknown option 'size'; known options: none"


@pytest.mark.parametrize("word", ["on", "yes", "true", "y", "ON", "True"])
def test_words_for_on(word):
    assert convert("read-only", word, bool) is True


@pytest.mark.parametrize("word", ["off", "no", "false", "n", "OFF", "False"])
def test_words_for_off(word):
    assert convert("read-only", word, bool) is False


COMMAS = ["a,,b", "a,,", ",,a", ",,,,", "a,,,,b"]


@needs("qemu-img")
@pytest.mark.parametrize("value", COMMAS)
def test_commas_mean_what_they_mean_to_qemu(value):
    """The value that QEMU read is in what it says about the missing file."""
    line = f"driver=raw,file.filename=/no/{value},file.driver=file"
    told = subprocess.run(
        ["qemu-img", "info", "--image-opts", line], capture_output=True, text=True, check=False
    ).stderr
    name = parse_keyval(line)["file"]["filename"]
    assert f"Could not open '{name}': No such file or directory" in told
