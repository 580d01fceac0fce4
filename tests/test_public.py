"""The public surface: complete, documented, free of side effects, and as pleasant as the architecture promises."""

from __future__ import annotations

import ast
import asyncio
import inspect
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import blocklayer
from blocklayer.base import errors
from blocklayer.graph.graph import Graph as BareGraph

SOURCE = Path(blocklayer.__file__)


def test_everything_public_is_listed_and_everything_listed_is_there() -> None:
    tree = ast.parse(SOURCE.read_text())
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blocklayer.")
        for alias in node.names
    }
    made = {node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
    assembled = {
        "ThreadEngine",
        "BareGraph",
        "JobManager",
        *(driver.__name__ for driver in blocklayer.BUILT_IN_DRIVERS.values()),
    }
    assert set(blocklayer.__all__) == (imported | made | {"__version__"}) - assembled
    assert len(set(blocklayer.__all__)) == len(blocklayer.__all__)
    assert [name for name in blocklayer.__all__ if not hasattr(blocklayer, name)] == []


def test_every_error_of_the_tree_is_public() -> None:
    tree = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.BlockError)
    }
    assert tree - set(blocklayer.__all__) == set()
    assert all(getattr(blocklayer, name) is getattr(errors, name) for name in tree)


def test_the_most_important_comes_first_and_errors_follow_their_tree() -> None:
    names = blocklayer.__all__
    assert names[:2] == ["Graph", "Node"]
    assert names[-1] == "__version__"
    kinds = [name for name in names if name.endswith("Error")]
    first = names.index(kinds[0])
    assert names[first:-1] == kinds
    for name in kinds[1:]:
        parents = [base.__name__ for base in getattr(blocklayer, name).__mro__[1:] if base.__name__ in kinds]
        assert all(kinds.index(parent) < kinds.index(name) for parent in parents)


@pytest.mark.parametrize("name", blocklayer.__all__)
def test_every_public_name_says_what_it_is(name: str) -> None:
    value = getattr(blocklayer, name)
    if name == "__version__":
        assert isinstance(value, str)
        return
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    generated = value.__name__ + "("
    assert not text.startswith(generated), f"{name} has the docstring that dataclasses make up"
    for member, function in vars(value).items():
        if not member.startswith("_") and inspect.isfunction(function):
            assert function.__doc__, f"{name}.{member} has no docstring"


def test_every_built_in_driver_is_in_the_table_by_its_own_name() -> None:
    assert {name: driver.name for name, driver in blocklayer.BUILT_IN_DRIVERS.items()} == {
        name: name for name in blocklayer.BUILT_IN_DRIVERS
    }
    assert set(blocklayer.BUILT_IN_DRIVERS) == {
        "qcow2",
        "raw",
        "file",
        "memory",
        "nbd",
        "null-co",
        "throttle",
        "faults",
    }


IMPORT = """
import asyncio, os, sys, threading
before = (threading.active_count(), len(os.listdir("/proc/self/fd")), sorted(os.environ), sys.gettrace(), len(sys.meta_path))
import blocklayer
after = (threading.active_count(), len(os.listdir("/proc/self/fd")), sorted(os.environ), sys.gettrace(), len(sys.meta_path))
assert before == after, (before, after)
try:
    asyncio.get_running_loop()
except RuntimeError:
    pass
else:
    raise AssertionError("a loop runs")
import logging
assert not logging.getLogger().handlers
assert not any(logger.handlers for name in list(logging.root.manager.loggerDict)
               if name.startswith("blocklayer") for logger in [logging.getLogger(name)])
graph = blocklayer.Graph()
assert threading.active_count() == before[0], "a graph that nobody entered has started something"
assert graph.nodes == {}
print("quiet")
"""


def test_importing_registers_nothing_and_starts_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT],
        capture_output=True,
        text=True,
        check=False,
        cwd=SOURCE.parent.parent,
    )
    assert (done.stdout, done.stderr) == ("quiet\n", "")


def io_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("blocklayer")]


async def test_a_graph_that_was_left_has_stopped_its_threads_and_tasks(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(4096))
    async with blocklayer.Graph() as graph:
        disk = await graph.open(tmp_path / "disk.raw")
        await disk.write(0, b"x")
        assert io_threads()
    assert io_threads() == []
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_two_graphs_in_one_process_do_not_know_of_each_other() -> None:
    class Fast(blocklayer.BUILT_IN_DRIVERS["memory"]):  # type: ignore[misc,name-defined]  # a class chosen at run time
        """A replacement that one graph knows."""

    async with (
        blocklayer.Graph(drivers={"memory": Fast, "fast": Fast}) as first,
        blocklayer.Graph(gate=blocklayer.Gate.deny()) as second,
    ):
        mine = await first.open({"driver": "memory", "size": "1M"}, node_name="disk")
        theirs = await second.open({"driver": "memory", "size": "1M"}, node_name="disk")
        assert type(mine.driver) is Fast
        assert type(theirs.driver) is not Fast
        await mine.write(0, b"mine")
        assert await theirs.read(0, 4) == bytes(4)
        assert "fast" not in second.drivers
        assert "fast" not in blocklayer.BUILT_IN_DRIVERS
        assert (first.gate, second.gate) == (blocklayer.Gate(), blocklayer.Gate.deny())
        assert first.engine is not second.engine
        assert first.jobs is not second.jobs
        await first.close()
        assert not theirs.closed
        assert await theirs.read(0, 4) == bytes(4)


async def test_what_using_it_feels_like(tmp_path: Path) -> None:
    async with blocklayer.Graph() as graph:
        await graph.create(tmp_path / "base.qcow2", format="qcow2", size="4M")
        base = await graph.open(tmp_path / "base.qcow2")
        await base.write(0, b"base" * 16384)
        await base.close()
        await graph.create(tmp_path / "vm.qcow2", format="qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
        seed = await graph.open(tmp_path / "vm.qcow2")
        await seed.write(65536, b"old." * 16384)
        await seed.close()

    async with blocklayer.Graph() as graph:
        disk = await graph.open(tmp_path / "vm.qcow2")
        job = await graph.backup(disk, tmp_path / "monday.qcow2", sync="top")
        await disk.write(65536, b"new." * 16384)
        seen = [progress async for progress in job.progress()]
        result = await job.wait()

        assert await disk.read(0, 65536) == b"base" * 16384
        assert await disk.read(65536, 65536) == b"new." * 16384
        extents = [(extent.kind.value, extent.depth, extent.host_offset is None) async for extent in disk.extents()]
        assert extents == [("data", 1, False), ("data", 0, False), ("zero", 1, True)]

    assert all(isinstance(progress, blocklayer.Progress) for progress in seen)
    assert seen[-1].current == seen[-1].total
    assert isinstance(result, blocklayer.BackupResult)
    async with blocklayer.Graph() as graph:
        monday = await graph.open(tmp_path / "monday.qcow2", read_only=True)
        assert await monday.read(65536, 65536) == b"old." * 16384
        assert await monday.read(0, 65536) == b"base" * 16384


def test_the_public_graph_is_the_bare_one_with_jobs() -> None:
    added = {name for name in vars(blocklayer.Graph) if not name.startswith("_")}
    assert issubclass(blocklayer.Graph, BareGraph)
    assert added == {"backup", "backup_group", "events"}
