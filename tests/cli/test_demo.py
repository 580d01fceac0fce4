"""The demo proves what it claims: it ends with 0 only if every copy is right, and finds out if one is not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from blocklayer.cli import demo, demo_disk
from blocklayer.jobs.before_write import BeforeWrite
from tests.helpers.command import blocklayer
from tests.helpers.peers import needs

if TYPE_CHECKING:
    from blocklayer.base.errors import BlockError

CHECKS = ["every byte", "e2fsck", "checksums of 32 files", "qemu-img compare", "qemu-img check"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, and less than a second."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(demo, "NONE_SECONDS", 0.05)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other programs: a disk of random data."""
    monkeypatch.setattr(demo_disk, "find", lambda program: None)


def run(*arguments: str | Path):
    return blocklayer("demo", "--size", "16M", *arguments)


def found(text: str) -> list[str]:
    """The last column of the table, without its frame."""
    return re.findall(r"│ ((?:ok|FAILED) .*?) *│$", text, re.MULTILINE)


@needs("qemu-img", "mkfs.ext4", "debugfs", "e2fsck")
def test_every_copy_is_proven_in_eighty_columns() -> None:
    """No line is longer, and none of the table's cells goes on in a second line."""
    outcome = run()
    assert (outcome.status, outcome.err) == (0, "")
    *_, last = outcome.out.splitlines()
    assert last == "Every copy is the disk as it was at its point in time."
    assert found(outcome.out) == [
        *(f"ok {name}" for name in CHECKS),
        *(f"ok {name}" for name in CHECKS),
        *(f"ok {name}" for name in CHECKS if name != "qemu-img compare"),
        "ok qemu-img check, source",
    ]
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "A disk of 16 MiB: ext4 with 32 files, as a qcow2 chain of two layers.\n" in outcome.out


def test_without_other_programs_the_demo_judges_itself(bare: None) -> None:
    outcome = run()
    assert outcome.status == 0
    assert found(outcome.out) == [*["ok every byte", "ok our own check"] * 3, "ok our own check, source"]
    assert outcome.out.startswith(
        "e2fsprogs is not installed: the proof goes without it.\n"
        "qemu-utils is not installed: the proof goes without it.\n"
        "A disk of 16 MiB: random data "
    )
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_a_backup_that_does_not_save_old_data_is_found_out(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guests write, and nobody copies what they overwrite."""

    async def forget(self: BeforeWrite, offset: int, length: int) -> None:
        return None

    monkeypatch.setattr(BeforeWrite, "save", forget)
    outcome = run()
    assert outcome.status == 1
    assert "FAILED every byte" in found(outcome.out)
    assert outcome.out.endswith("\nSomething is wrong: see what FAILED above.\n")


@pytest.mark.parametrize(("offset", "what"), [(-4096, "every byte"), ((2 << 16) + 8, "check")])
def test_a_copy_that_is_damaged_is_found_out(
    bare: None, monkeypatch: pytest.MonkeyPatch, offset: int, what: str
) -> None:
    """In its last data, or in a reference count."""
    wait = demo.blocklayer.BackupJob.wait

    async def damage(self: demo.blocklayer.BackupJob) -> object:
        result = await wait(self)
        if result.sync.value == "full":
            data = bytearray(Path(result.target).read_bytes())
            data[offset] ^= 0x55
            data[offset + 1] ^= 0x55
            Path(result.target).write_bytes(data)
        return result

    monkeypatch.setattr(demo.blocklayer.BackupJob, "wait", damage)
    outcome = run()
    failed = [line for line in found(outcome.out) if line.startswith("FAILED")]
    assert outcome.status == 1
    assert failed
    assert all(what in line for line in failed)


def test_a_guest_that_fails_ends_the_demo_with_its_error(bare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: demo_disk.Guest, node: object, block: int) -> BlockError:
        raise demo.blocklayer.IOFailedError("the guest's write failed")

    monkeypatch.setattr(demo_disk.Guest, "_write", fail)
    outcome = run()
    assert outcome.status == 1
    assert outcome.err == "blocklayer: the guest's write failed\n"


def test_what_is_kept_can_be_used_again(here: Path) -> None:
    for _ in range(2):
        outcome = run("--keep", here / "kept")
        assert outcome.status == 0
        assert f"Everything is in {here / 'kept'}\n" in outcome.out
    names = {path.name for path in (here / "kept").iterdir()}
    assert {"base.qcow2", "vm.qcow2", "full.qcow2", "top.qcow2", "none.qcow2"} <= names


def test_nothing_is_left_behind_unless_asked_to(bare: None, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(here))
    assert run().status == 0
    assert not list(here.iterdir())


def test_a_seed_repeats_contents_and_another_one_gives_others(bare: None, here: Path) -> None:
    for seed, folder in (("3", "a"), ("3", "b"), ("4", "c")):
        assert run("--seed", seed, "--keep", folder).status == 0
    assert [blocklayer("compare", "a/base.qcow2", f"{folder}/base.qcow2").status for folder in "bc"] == [0, 1]


@needs("mkfs.ext4", "debugfs")
def test_a_disk_that_cannot_be_made_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SIZE_MIN", 0)
    outcome = blocklayer("demo", "--size", "2M", "--keep", here / "kept")
    assert outcome.status == 1
    assert outcome.err.startswith("blocklayer: mkfs.ext4 could not make the demo's disk: ")


@pytest.mark.parametrize(
    ("size", "message"),
    [("15M", "the demo's disk needs at least 16 MiB, not 15 MiB"), ("huge", "argument --size: 'huge' is not a size")],
)
def test_a_size_that_is_none_for_a_disk(size: str, message: str) -> None:
    outcome = blocklayer("demo", "--size", size)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith(f"blocklayer: {message}")


def test_a_verdict_without_checks_is_not_good() -> None:
    verdict = demo.Verdict("full", 0.0, 0, None)
    assert not verdict.good
    verdict.checks.append(("every byte", True))
    assert verdict.good
    verdict.checks.append(("e2fsck", False))
    assert not verdict.good


def test_the_real_command_fails_make(here: Path) -> None:
    """``make demo`` is this command: its status is make's."""
    makefile = Path(__file__).parent.parent.parent / "Makefile"
    assert "\t$(BIN)/blocklayer demo\n" in makefile.read_text()
    done = subprocess.run(
        [sys.executable, "-m", "blocklayer", "demo", "--size", "1M"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, "blocklayer: the demo's disk needs at least 16 MiB, not 1 MiB\n")
