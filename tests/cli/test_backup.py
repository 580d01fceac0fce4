"""``blocklayer backup``: every option, checked by qemu-img; what it prints; how it ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.command import Outcome, blocklayer, qemu
from tests.helpers.peers import needs, qemu_check, qemu_img, qemu_io

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs("qemu-img", "qemu-io")

PROGRESS_KEYS = {"event", "job", "current", "total", "rate", "eta"}
RESULT_KEYS = {
    "job_id", "sync_requested", "sync", "reason", "background_bytes", "before_write_bytes", "zero_bytes", "skipped_bytes",
    "guest_waits", "cluster_size", "started", "ended", "target", "warnings",
}  # fmt: skip


def is_copy(source: str | Path, copy: str | Path) -> bool:
    return qemu("compare", source, copy).status == 0


@pytest.fixture
def chain(here: Path) -> Path:
    """disk.qcow2 on base.qcow2, in the current folder."""
    qemu_img("create", "-f", "qcow2", "base.qcow2", "8M")
    qemu_io("base.qcow2", "write -P 1 0 3M")
    qemu_img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "disk.qcow2")
    qemu_io("disk.qcow2", "write -P 2 1M 1M", "write -z 2M 64k")
    return here


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- what is copied ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "format"),
    [
        ([], "qcow2"),
        (["--sync", "full"], "qcow2"),
        (["--format", "qcow2"], "qcow2"),
        (["--format", "raw"], "raw"),
        (["--compress"], "qcow2"),
        (["--compress", "-o", "compression_type=zstd"], "qcow2"),
        (["-o", "cluster_size=4k,lazy_refcounts=on", "-o", "extended_l2=off"], "qcow2"),
        (["--speed", "1G"], "qcow2"),
        (["--max-workers", "1"], "qcow2"),
        (["--max-chunk", "128k"], "qcow2"),
        (["--min-cluster-size", "1M"], "qcow2"),
        (["--use-copy-range", "--format", "raw"], "raw"),
        (["--cache", "none"], "qcow2"),
        (["--cache", "writethrough"], "qcow2"),
        (["--cache", "unsafe"], "qcow2"),
        (["--retry", "3"], "qcow2"),
        (["--on-source-error", "ignore", "--on-target-error", "enospc"], "qcow2"),
        (["-U"], "qcow2"),
        (["-f", "qcow2"], "qcow2"),
        (["--quiet"], "qcow2"),
    ],
)
def test_a_full_backup_is_the_whole_chain_in_one_image(chain: Path, options: list[str], format: str) -> None:
    outcome = blocklayer("backup", *options, "disk.qcow2", "copy")
    assert (outcome.status, outcome.err) == (0, "")
    facts = qemu("info", "--output=json", "copy").json
    assert (facts["format"], facts.get("backing-filename")) == (format, None)
    assert is_copy("disk.qcow2", "copy")
    if format == "qcow2":
        qemu_check("copy")
    assert ("--quiet" in options) == (outcome.out == "")
    assert files(chain) == ["base.qcow2", "copy", "disk.qcow2"]


def test_a_top_backup_is_on_top_of_the_same_base(chain: Path) -> None:
    outcome = blocklayer("backup", "--sync", "top", "disk.qcow2", "copy.qcow2")
    assert outcome.status == 0
    assert "top, 1 MiB copied in " in outcome.out
    assert "6.94 MiB left to the backing file" in outcome.out
    facts = qemu("info", "--output=json", "copy.qcow2").json
    assert (facts["backing-filename"], facts["backing-filename-format"]) == (str(chain / "base.qcow2"), "qcow2")
    assert is_copy("disk.qcow2", "copy.qcow2")


def test_options_reach_the_target(chain: Path) -> None:
    blocklayer("backup", "-o", "cluster_size=4k,compression_type=zstd", "--compress", "disk.qcow2", "copy.qcow2")
    facts = qemu("info", "--output=json", "copy.qcow2").json
    assert (facts["cluster-size"], facts["format-specific"]["data"]["compression-type"]) == (4096, "zstd")
    check = qemu_check("copy.qcow2")
    assert check["compressed-clusters"] == check["allocated-clusters"]


@pytest.mark.parametrize("source", ["sparse.raw", "full.raw", "empty.raw", "compressed.qcow2", "data.qcow2", "snapshots.qcow2",
                                    "extended.qcow2", "old.qcow2", "top.qcow2", "short-base.qcow2", "empty.qcow2"])  # fmt: skip
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_every_kind_of_source(gallery: Path, tmp_path: Path, source: str, format: str) -> None:
    assert blocklayer("backup", "--format", format, source, tmp_path / "copy").status == 0
    assert is_copy(source, tmp_path / "copy")


def test_an_existing_target_is_replaced_as_a_whole(chain: Path) -> None:
    Path("copy.qcow2").write_bytes(b"something else")
    assert blocklayer("backup", "disk.qcow2", "copy.qcow2").status == 0
    assert is_copy("disk.qcow2", "copy.qcow2")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_target_that_is_there_can_be_written_into(chain: Path, format: str) -> None:
    qemu_img("create", "-f", format, f"copy.{format}", "8M")
    qemu_io(f"copy.{format}", "write -P 9 0 8M", format=format)
    inode = os.stat(f"copy.{format}").st_ino
    assert blocklayer("backup", "--mode", "existing", "disk.qcow2", f"copy.{format}").status == 0
    assert os.stat(f"copy.{format}").st_ino == inode
    assert is_copy("disk.qcow2", f"copy.{format}")


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.qcow2", "copy.qcow2"], "file 'nowhere.qcow2': open failed: No such file or directory"),
        (["disk.qcow2", "disk.qcow2"], "the target is a file of the source"),
        (["disk.qcow2", "base.qcow2"], "the target is a file of the source"),
        (["--mode", "existing", "disk.qcow2", "copy.qcow2"], "file 'copy.qcow2': "),
        (["disk.qcow2", "no/such/folder/copy.qcow2"], "No such file or directory"),
        (["--format", "vmdk", "disk.qcow2", "copy.qcow2"], "no driver is called 'vmdk'; there are "),
        (["--compress", "--format", "raw", "disk.qcow2", "copy.raw"], "compress"),
        (["--max-workers", "0", "disk.qcow2", "copy.qcow2"], "max-workers must be between 1 and "),
        (["--max-chunk", "1k", "disk.qcow2", "copy.qcow2"], "max-chunk (1024) is less than "),
        (["--min-cluster-size", "3k", "disk.qcow2", "copy.qcow2"], "min-cluster-size must be a power of two"),
        (["-o", "unheard-of=1", "disk.qcow2", "copy.qcow2"], "unknown option 'unheard-of'"),
        (["-o", "cluster_size=3k", "disk.qcow2", "copy.qcow2"], "cluster_size 3072 is not a power of two"),
        (["--cache", "often", "disk.qcow2", "copy.qcow2"], "Invalid cache option: often; it is one of writeback, "),
        (["--sync", "some", "disk.qcow2", "copy.qcow2"], "invalid choice: 'some'"),
        (["--speed", "fast", "disk.qcow2", "copy.qcow2"], "'fast' is not a size"),
        (["--retry", "-1", "disk.qcow2", "copy.qcow2"], "'-1' is not a whole number"),
        (["disk.qcow2"], "the following arguments are required: TARGET"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_touched(chain: Path, arguments: list[str], message: str) -> None:
    before = {name: Path(name).read_bytes() for name in files(chain)}
    outcome = blocklayer("backup", *arguments)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("blocklayer: ")
    assert message in outcome.err
    assert {name: Path(name).read_bytes() for name in files(chain)} == before


def test_a_target_of_another_size_is_refused(chain: Path) -> None:
    qemu_img("create", "-f", "qcow2", "copy.qcow2", "4M")
    outcome = blocklayer("backup", "--mode", "existing", "disk.qcow2", "copy.qcow2")
    assert outcome.status == 1
    assert "size" in outcome.err


def test_a_source_that_cannot_be_read_fails_the_backup(chain: Path) -> None:
    """An entry of the base's L2 table points between clusters."""
    with open("base.qcow2", "r+b") as file:
        file.seek((4 << 16) + 8)
        file.write((1 << 63 | 5 << 16 | 512).to_bytes(8, "big"))
    outcome = blocklayer("backup", "--output", "json", "disk.qcow2", "copy.qcow2")
    assert outcome.status == 1
    *_, failing, failed = lines(outcome)
    assert failing == {"event": "error", "job": failed["job"], "operation": "read", "action": "report"}
    assert failed["event"] == "failed"
    assert outcome.err.splitlines()[0] == "blocklayer: read error of disk.qcow2"
    assert outcome.err.splitlines()[1] == f"blocklayer: {failed['error']}"
    assert files(chain) == ["base.qcow2", "disk.qcow2"]


# -- JSON lines ----------------------------------------------------------------------------------------------------


def lines(outcome: Outcome) -> list[dict[str, object]]:
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_each_line_of_json_is_a_record_with_the_documented_keys(chain: Path) -> None:
    outcome = blocklayer("backup", "--output", "json", "disk.qcow2", "copy.qcow2")
    *progress, completed = lines(outcome)
    assert (outcome.status, outcome.err) == (0, "")
    assert {frozenset(each) for each in progress} == {frozenset(PROGRESS_KEYS)}
    assert {each["event"] for each in progress} == {"progress"}
    amounts = [each["current"] for each in progress]
    assert amounts == sorted(amounts)
    assert progress[-1]["current"] == progress[-1]["total"]
    assert completed.keys() == {"event", "job", "result"}
    result = completed["result"]
    assert isinstance(result, dict)
    assert result.keys() == RESULT_KEYS
    assert {each["job"] for each in (*progress, completed)} == {result["job_id"]}
    assert (result["sync"], result["background_bytes"], result["target"]) == (
        "full",
        3 * (1 << 20) - 65536,
        "copy.qcow2",
    )


def test_quiet_leaves_json_alone(chain: Path) -> None:
    assert lines(blocklayer("backup", "-q", "--output", "json", "disk.qcow2", "copy.qcow2"))[-1]["event"] == "completed"


# -- signals and terminals: real processes -------------------------------------------------------------------------


@pytest.fixture
def slow(chain: Path) -> Iterator[subprocess.Popen[str]]:
    """A backup that has begun and would take hours, with an older file in the place of its target."""
    Path("copy.qcow2").write_bytes(b"older")
    process = start("--speed", "1k", "--output", "json", "disk.qcow2", "copy.qcow2")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "progress"
    yield process
    process.kill()
    process.communicate()


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "blocklayer", "backup", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_and_leaves_what_was_there(chain: Path, slow: subprocess.Popen[str], signum: int) -> None:
    assert any(name.endswith(".part") for name in files(chain))
    slow.send_signal(signum)
    out, err = slow.communicate(timeout=60)
    assert (slow.returncode, err) == (128 + signum, "")
    assert json.loads(out.splitlines()[-1])["event"] == "cancelled"
    assert files(chain) == ["base.qcow2", "copy.qcow2", "disk.qcow2"]
    assert Path("copy.qcow2").read_bytes() == b"older"
    qemu_check("disk.qcow2")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_point_in_time_is_held_until_a_signal_which_is_success(chain: Path, signum: int) -> None:
    process = start("--sync", "none", "--output", "json", "disk.qcow2", "copy.qcow2")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == {"event": "holding", "job": "backup0", "target": "copy.qcow2"}
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    last = json.loads(out.splitlines()[-1])
    assert (last["event"], last["result"]["sync"]) == ("completed", "none")
    assert json.loads(qemu_img("info", "--output", "json", "copy.qcow2"))["full-backing-filename"] == str(
        chain / "disk.qcow2"
    )
    qemu_check("copy.qcow2")
    qemu_img("compare", "disk.qcow2", "copy.qcow2")


def test_a_second_signal_does_not_disturb_the_first(chain: Path, slow: subprocess.Popen[str]) -> None:
    slow.send_signal(signal.SIGINT)
    slow.send_signal(signal.SIGTERM)
    _, err = slow.communicate(timeout=60)
    assert (slow.returncode, err) in [(130, ""), (143, "")]
    assert files(chain) == ["base.qcow2", "copy.qcow2", "disk.qcow2"]


def test_a_reader_that_goes_away_ends_the_backup(chain: Path) -> None:
    """As ``| head`` does."""
    process = start("--speed", "2M", "--output", "json", "disk.qcow2", "copy.qcow2")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (128 + signal.SIGPIPE, "")
    assert files(chain) == ["base.qcow2", "disk.qcow2"]


def on_a_terminal(*arguments: str, columns: int = 80) -> tuple[int, str]:
    """Exit status of a backup whose standard error is a terminal, and what came there."""
    controller, terminal = os.openpty()
    command = [sys.executable, "-m", "blocklayer", "backup", *arguments]
    environment = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, env=environment)
    os.close(terminal)
    seen = b""
    try:
        while piece := os.read(controller, 65536):
            seen += piece
    except OSError:
        pass  # how a terminal says that nobody writes to it any more
    os.close(controller)
    process.communicate(timeout=60)
    return process.returncode, seen.decode()


def test_a_terminal_shows_a_bar(chain: Path) -> None:
    status, seen = on_a_terminal("disk.qcow2", "copy.qcow2")
    assert status == 0
    assert "full backup" in seen
    assert "8.0/8.0 MiB" in seen or "3.0/3.0 MiB" in seen


def test_quiet_shows_no_bar(chain: Path) -> None:
    assert on_a_terminal("-q", "disk.qcow2", "copy.qcow2") == (0, "")


def test_a_target_without_space_stops_the_backup_until_it_is_told_to_go_on(chain: Path) -> None:
    """The limit on file sizes stands for a full disk; SIGCONT tries again, SIGTERM gives up."""
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20));"
    code += "from blocklayer.cli.main import main; sys.exit(main())"
    arguments = ["backup", "--on-target-error", "enospc", "--output", "json", "disk.qcow2", "copy.qcow2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    expected = (
        f"blocklayer: write error of copy.qcow2; stopped: put it right, then continue with kill -CONT {process.pid}\n"
    )
    assert process.stderr.readline() == expected
    process.send_signal(signal.SIGCONT)
    assert process.stderr.readline() == expected
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert files(chain) == ["base.qcow2", "disk.qcow2"]
