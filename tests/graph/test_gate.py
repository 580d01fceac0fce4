"""The gate: what an image's own header may name, whatever it writes there, and refusals that name the reference."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from blocklayer.base.errors import ImageError, ReferenceRefusedError
from blocklayer.graph.gate import REFERENCE_LENGTH_MAX, Gate, resolve

if TYPE_CHECKING:
    from pathlib import Path

OUTSIDE = "it lies outside the directories that may be opened from"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``images/`` with an image and its base, and ``secret/`` beside it."""
    for name in ("images/sub", "images-of-others", "secret"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("images/top.qcow2", "images/base.qcow2", "images/sub/deep.qcow2", "secret/key", "images/a:b"):
        (tmp_path / name).touch()
    (tmp_path / "images-of-others/x").touch()
    return tmp_path


def check(gate: Gate, folder: Path, reference: str) -> str:
    """What the gate answers to the image ``images/top.qcow2``."""
    return gate.check(reference, image=str(folder / "images/top.qcow2"), role="backing")


def refusal(gate: Gate, folder: Path, reference: str) -> ReferenceRefusedError:
    with pytest.raises(ReferenceRefusedError) as raised:
        check(gate, folder, reference)
    return raised.value


@pytest.mark.parametrize(
    "reference", ["base.qcow2", "./base.qcow2", "file:base.qcow2", "sub/deep.qcow2", "a:b", "missing"]
)
def test_by_default_an_image_may_name_files_in_its_own_directory(folder: Path, reference: str) -> None:
    expected = os.path.join(folder, "images", reference.removeprefix("file:"))
    assert check(Gate(), folder, reference) == expected


def test_an_absolute_name_in_the_own_directory_is_as_good(folder: Path) -> None:
    name = str(folder / "images/base.qcow2")
    assert check(Gate(), folder, name) == name
    assert check(Gate(), folder, f"file:{name}") == name


@pytest.mark.parametrize(
    "reference",
    [
        "../secret/key",
        "sub/../../secret/key",
        "/etc/passwd",
        "file:/etc/passwd",
        "file:///etc/passwd",
        "..",
        "../images-of-others/x",
    ],
)
def test_by_default_nothing_else_is_opened(folder: Path, reference: str) -> None:
    error = refusal(Gate(), folder, reference)
    assert isinstance(error, ImageError)
    assert error.reference == reference
    assert error.filename == str(folder / "images/top.qcow2")
    assert f"its header names {reference!r} as backing file, which was not opened: {OUTSIDE}" in str(error)
    assert "top.qcow2" in str(error)
    assert "gate=Gate.within(DIRECTORY)" in str(error)


def test_a_symbolic_link_does_not_lead_out(folder: Path) -> None:
    (folder / "images/link").symlink_to(folder / "secret/key")
    (folder / "images/door").symlink_to(folder / "secret")
    assert OUTSIDE in str(refusal(Gate(), folder, "link"))
    assert OUTSIDE in str(refusal(Gate(), folder, "door/key"))
    assert OUTSIDE in str(refusal(Gate.within(folder / "images"), folder, "door/../secret/key"))


def test_a_symbolic_link_inside_is_followed(folder: Path) -> None:
    (folder / "images/link").symlink_to("base.qcow2")
    assert check(Gate(), folder, "link") == str(folder / "images/link")


def test_an_allowed_directory_may_be_named_by_a_symbolic_link(folder: Path) -> None:
    (folder / "alias").symlink_to(folder / "secret")
    assert check(Gate.within(folder / "alias"), folder, "../secret/key")
    assert check(Gate((str(folder / "alias"),)), folder, "../secret/key")


def test_an_allowed_directory_may_be_relative_to_the_working_directory(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for gate in (Gate.within("secret"), Gate(("secret",))):
        assert check(gate, folder, "../secret/key")
        assert OUTSIDE in str(refusal(gate, folder, "../images-of-others/x"))


def test_within_allows_what_lies_below_its_directories_and_not_the_own_one(folder: Path) -> None:
    gate = Gate.within(folder / "secret", folder / "images-of-others")
    assert check(gate, folder, "../secret/key") == str(folder / "images/../secret/key")
    assert check(gate, folder, "../images-of-others/x")
    assert OUTSIDE in str(refusal(gate, folder, "base.qcow2"))
    assert check(Gate.within(folder / "secret", siblings=True), folder, "base.qcow2")


def test_a_directory_does_not_allow_one_whose_name_begins_alike(folder: Path) -> None:
    assert OUTSIDE in str(refusal(Gate.within(folder / "images"), folder, "../images-of-others/x"))


def test_the_root_directory_allows_every_plain_name(folder: Path) -> None:
    assert check(Gate.within("/"), folder, "/etc/passwd") == "/etc/passwd"


def test_anywhere_allows_every_plain_name_but_no_protocol_and_no_json(folder: Path) -> None:
    gate = Gate.anywhere()
    assert check(gate, folder, "/etc/passwd") == "/etc/passwd"
    assert gate.probe is False
    assert "it uses the protocol 'nbd'" in str(refusal(gate, folder, "nbd://host/export"))
    assert "it uses the protocol 'json'" in str(refusal(gate, folder, 'json:{"driver": "null-co"}'))
    assert "it uses the protocol 'json'" in str(refusal(gate, folder, 'file:json:{"driver": "null-co"}'))


@pytest.mark.parametrize("reference", ["base.qcow2", "/etc/passwd", "json:{}", "nbd://host", "file:base.qcow2"])
def test_deny_allows_nothing(folder: Path, reference: str) -> None:
    assert refusal(Gate.deny(), folder, reference).reference == reference
    assert not Gate.deny().allows_json(reference)


def test_only_the_permissive_gate_follows_json_and_guesses_formats() -> None:
    assert Gate.permissive().allows_json('json:{"driver": "null-co"}')
    assert Gate.permissive().probe
    assert not Gate.permissive().allows_json("base.qcow2")
    for gate in (Gate(), Gate.within("/"), Gate.anywhere(), Gate.deny()):
        assert not gate.allows_json('json:{"driver": "null-co"}')
        assert not gate.probe


@pytest.mark.parametrize("gate", [Gate(), Gate.anywhere(), Gate.permissive()])
@pytest.mark.parametrize("reference", ["a\0b", "x" * (REFERENCE_LENGTH_MAX + 1)])
def test_what_is_no_file_name_is_refused_by_every_gate(folder: Path, gate: Gate, reference: str) -> None:
    error = refusal(gate, folder, reference)
    assert "it is no file name" in str(error)
    assert len(error.reference) <= 64


def test_an_image_without_a_name_has_no_directory_of_its_own(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder / "images")
    with pytest.raises(ReferenceRefusedError) as raised:
        Gate().check("base.qcow2", image=None, role="backing")
    assert raised.value.filename is None
    assert Gate.within(folder).check("base.qcow2", image=None, role="backing") == "base.qcow2"


def test_an_image_named_by_a_relative_path_has_its_directory_too(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder / "images")
    assert Gate().check("base.qcow2", image="top.qcow2", role="backing") == "base.qcow2"
    monkeypatch.chdir(folder)
    assert Gate().check("base.qcow2", image="images/top.qcow2", role="backing") == "images/base.qcow2"


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("base", "/a/top", "/a/base"),
        ("/b/base", "/a/top", "/b/base"),
        ("../base", "a/top", "a/../base"),
        ("base", "top", "base"),
        ("base", None, "base"),
    ],
)
def test_a_relative_name_is_relative_to_the_directory_of_the_image(name: str, image: str | None, expected: str) -> None:
    assert resolve(name, image) == expected
