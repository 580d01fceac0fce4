"""Options of the benchmarks, the loops, and the environment that results are stored with."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks import harness, loops, workers
from benchmarks.command_line import main, parse_size, parser, settings_of
from benchmarks.environment import environment, file_system_of, program_version
from benchmarks.harness import Case, Scenario, Settings, requests_per_second

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("64K", 65536), ("3m", 3 << 20), ("1G", 1 << 30)])
def test_sizes_are_bytes_with_a_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "1X", "-"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|invalid literal"):
        parse_size(text)


def test_all_installed_loops_run_unless_one_is_named() -> None:
    assert settings_of(parser("p", "").parse_args([])).loops == loops.available()
    assert settings_of(parser("p", "").parse_args(["--loop", "stock"])).loops == ("stock",)


def test_a_benchmark_prints_its_table_and_writes_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def cases(settings: Settings) -> Iterator[Sequence[Case]]:
        yield [Case("c", "peer", (requests_per_second(),), {"stock": lambda: {"rate": settings.rounds}}, None)]

    monkeypatch.setattr(harness, "settle", lambda _size: None)
    path = tmp_path / "out.json"
    main(Scenario("demo", "", cases), ["--rounds", "2", "--json", str(path), "--loop", "stock"])
    assert "| demo | c | stock |" in capsys.readouterr().out
    (result,) = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert result["ours"] == {"rounds": [2, 2], "median": 2}


@pytest.mark.parametrize("loop", loops.available())
def test_each_loop_runs_a_coroutine(loop: str) -> None:
    async def name() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert loops.run(loop, name).startswith("uvloop" if loop == "uvloop" else "asyncio")


def test_an_unknown_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="'trio'"):
        loops.run("trio", lambda: asyncio.sleep(0))


async def test_workers_do_each_request_once_and_keep_to_the_depth() -> None:
    seen: list[int] = []
    running = 0
    most = 0

    async def request(offset: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        seen.append(offset)

    assert await workers.rate(range(20), 4, request) > 0
    assert sorted(seen) == list(range(20))
    assert most == 4


def test_the_environment_says_what_was_measured_with(tmp_path: Path) -> None:
    around = environment(tmp_path, ("stock",))
    assert around["loops"] == ["stock"]
    assert {"python", "kernel", "cpu_count", "file_system", "versions", "commit"} <= around.keys()
    json.dumps(around)


def test_the_longest_mount_point_decides_the_file_system() -> None:
    mounts = "/dev/a / ext4 rw 0 0\ntmpfs /proc tmpfs rw 0 0\n"
    assert file_system_of(Path("/proc/self"), mounts) == "tmpfs"
    assert file_system_of(Path("/usr"), mounts) == "ext4"


def test_a_program_that_is_not_there_has_no_version() -> None:
    assert program_version("no-such-program") is None
