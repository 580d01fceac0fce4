"""Image locks between blocklayer and QEMU: whoever comes second is refused, in either order, with the same words.

QEMU's tools let others write to raw images that they use (a running machine does not); so they never exclude a reader,
and it is we who refuse to write beside them.
"""

from __future__ import annotations

import subprocess
from contextlib import contextmanager

import pytest

import blocklayer
from benchmarks import storage_daemon
from blocklayer.base.errors import LockedError
from blocklayer.base.units import MIB
from tests.helpers.peers import needs, qemu_img, qemu_io, run

pytestmark = [needs("qemu-img", "qemu-io", "qemu-storage-daemon"), pytest.mark.interop]

FORMATS = ["raw", "qcow2"]
PROMPT = "qemu-io> "
TIMEOUT_S = 30

WRITES = 'Failed to get "write" lock'
READS_WHAT_IS_WRITTEN = 'Failed to get shared "write" lock'


@pytest.fixture(params=FORMATS)
def image(request, tmp_path):
    """An image of 1 MiB of each format, whose first bytes are 0x11; its name ends in its format."""
    path = tmp_path / f"disk.{request.param}"
    qemu_img("create", "-q", "-f", request.param, path, "1M")
    qemu_io(path, "write -P 0x11 0 64k", format=request.param)
    return path


def format_of(path):
    return path.suffix[1:]


@contextmanager
def qemu_holds(path, *options):
    """qemu-io has the image open, as its prompt tells; it is ended by the end of its input."""
    command = ["qemu-io", "-f", format_of(path), *options, path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.read(len(PROMPT)) == PROMPT, "it did not open the image"
            yield process
        finally:
            process.stdin.close()
            process.wait(TIMEOUT_S)


async def first_byte(graph, path, **options):
    """What a reader reads."""
    node = await graph.open(path, format=format_of(path), **options)
    data = await node.read(0, 1)
    await node.close()
    return data


async def refusal(graph, path, **options):
    with pytest.raises(LockedError) as caught:
        await graph.open(path, format=format_of(path), **options)
    return str(caught.value)


def refused_by_qemu(*command):
    """What ``command`` says of the lock that it did not get."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 1, done
    words = done.stderr.partition("Failed to get ")
    return "".join(words[1:]).splitlines()[0]


# -- QEMU was there first ------------------------------------------------------------------------------------------


async def test_an_image_that_qemu_writes_cannot_be_opened(image):
    with qemu_holds(image):
        async with blocklayer.Graph() as graph:
            for_writing = await refusal(graph, image)
            for_reading = await refusal(graph, image, read_only=True)
    advice = ": is another process using the image? Stop it, or open with force_share to read only"
    assert for_writing.endswith(f"{WRITES if format_of(image) == 'qcow2' else READS_WHAT_IS_WRITTEN}{advice}")
    assert for_reading.endswith(f"{READS_WHAT_IS_WRITTEN}{advice}")
    assert f"file '{image}'" in for_writing


async def test_whoever_insists_may_read_what_qemu_writes(image):
    with qemu_holds(image):
        async with blocklayer.Graph() as graph:
            assert await first_byte(graph, image, read_only=True, force_share=True) == b"\x11"


async def test_sharing_by_force_is_for_readers(image):
    async with blocklayer.Graph() as graph:
        with pytest.raises(blocklayer.OptionError) as caught:
            await graph.open(image, format=format_of(image), force_share=True)
    assert str(caught.value) == "force-share needs read-only=on"


async def test_an_image_that_qemu_reads_can_be_read_and_written_only_if_qemu_allows_it(image):
    with qemu_holds(image, "-r"):
        async with blocklayer.Graph() as graph:
            assert await first_byte(graph, image, read_only=True) == b"\x11"
            if format_of(image) == "qcow2":
                assert WRITES in await refusal(graph, image)
            else:
                assert await first_byte(graph, image) == b"\x11"


async def test_what_was_refused_holds_nothing_and_works_when_qemu_is_gone(image):
    async with blocklayer.Graph() as graph:
        with qemu_holds(image) as process:
            await refusal(graph, image)
            process.stdin.write("write -P 0x22 0 64k\n")
            process.stdin.flush()
            assert "wrote 65536/65536 bytes" in process.stdout.readline()
        node = await graph.open(image, format=format_of(image))
        assert await node.read(0, 1) == b"\x22"
        await node.write(0, b"\x33")
        await node.close()
    qemu_io(image, "read -P 0x33 0 1", format=format_of(image))


async def test_a_qemu_that_was_killed_holds_nothing(image):
    async with blocklayer.Graph() as graph:
        with qemu_holds(image) as process:
            process.kill()
            process.wait(TIMEOUT_S)
            assert await first_byte(graph, image) == b"\x11"


async def test_without_locking_nobody_is_asked(tmp_path):
    path = tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "raw", path, "1M")
    options = {"driver": "raw", "file": {"driver": "file", "filename": str(path), "locking": "off"}}
    with qemu_holds(path) as process:
        async with blocklayer.Graph() as graph:
            node = await graph.open(options)
            await node.write(0, b"\x44" * 512)
            await node.close()
        process.stdin.write("read -P 0x44 0 512\n")
        process.stdin.flush()
        assert "read 512/512 bytes" in process.stdout.readline()


async def test_writers_that_share_write_together(tmp_path):
    path = tmp_path / "disk.raw"
    qemu_img("create", "-q", "-f", "raw", path, "1M")
    options = {"driver": "raw", "file": {"driver": "file", "filename": str(path), "share-rw": True}}
    async with blocklayer.Graph() as first, blocklayer.Graph() as second:
        nodes = [await first.open(options), await second.open(options)]
        await nodes[0].write(0, b"a" * 512)
        assert await nodes[1].read(0, 512) == b"a" * 512
        qemu_io(path, "read -P 0x61 0 512", "write -P 0x62 0 512", format="raw")
        assert await nodes[0].read(0, 512) == b"b" * 512
        for node in nodes:
            await node.close()


async def test_a_disk_of_a_running_daemon_is_refused_until_the_daemon_lets_go(image, tmp_path):
    """A format that may write its metadata holds its file from the start; a raw disk once it is exported for writing."""
    async with blocklayer.Graph() as graph, storage_daemon.running() as daemon:
        await daemon.execute(
            "blockdev-add", **storage_daemon.node_options("disk", image, format_of(image), unsafe=True)
        )
        address = {"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}}
        await daemon.execute("nbd-server-start", addr=address)
        await daemon.execute("block-export-add", id="export", type="nbd", node_name="disk", writable=True)
        assert "Failed to get " in await refusal(graph, image)
        assert READS_WHAT_IS_WRITTEN in await refusal(graph, image, read_only=True)
        await daemon.execute("nbd-server-stop")
        await daemon.wait_event("BLOCK_EXPORT_DELETED")
        await daemon.execute("blockdev-del", node_name="disk")
        assert await first_byte(graph, image) == b"\x11"


# -- we were there first -------------------------------------------------------------------------------------------


async def test_an_image_that_we_write_is_closed_to_qemu(image):
    kind = format_of(image)
    async with blocklayer.Graph() as graph:
        node = await graph.open(image, format=kind)
        assert refused_by_qemu("qemu-io", "-f", kind, "-c", "quit", image).startswith(WRITES)
        if kind == "qcow2":
            assert refused_by_qemu("qemu-io", "-r", "-f", kind, "-c", "quit", image).startswith(READS_WHAT_IS_WRITTEN)
            assert refused_by_qemu("qemu-img", "info", "-f", kind, image).startswith(READS_WHAT_IS_WRITTEN)
        assert refused_by_qemu("qemu-img", "resize", "-f", kind, image, "2M").startswith(WRITES)
        assert "virtual size: 1 MiB" in qemu_img("info", "-U", "-f", kind, image)
        await node.write(0, b"\x55")
        await node.close()
        qemu_io(image, "read -P 0x55 0 1", format=kind)


async def test_an_image_that_we_read_can_be_read_and_not_written_by_qemu(image):
    kind = format_of(image)
    async with blocklayer.Graph() as graph:
        node = await graph.open(image, format=kind, read_only=True)
        assert refused_by_qemu("qemu-io", "-f", kind, "-c", "quit", image).startswith(WRITES)
        qemu_io(image, "read -P 0x11 0 64k", format=kind, read_only=True)
        qemu_img("info", "-f", kind, image)
        await node.close()


async def test_a_reader_by_force_leaves_the_image_to_qemu(image):
    async with blocklayer.Graph() as graph:
        node = await graph.open(image, format=format_of(image), read_only=True, force_share=True)
        qemu_io(image, "write -P 0x66 0 64k", format=format_of(image))
        await node.close()


async def test_a_backing_file_in_use_can_be_read_by_qemu_and_not_written(tmp_path):
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    async with blocklayer.Graph() as graph:
        node = await graph.open(top)
        assert refused_by_qemu("qemu-io", "-f", "qcow2", "-c", "quit", base).startswith(WRITES)
        qemu_io(base, "read -P 0 0 64k", read_only=True)
        await node.close()


async def test_the_target_of_a_backup_is_ours_until_the_job_is_done(image, tmp_path):
    target = tmp_path / "target.qcow2"
    async with blocklayer.Graph() as graph:
        source = await graph.open(image, format=format_of(image))
        job = await graph.backup(source, target, sync="none")
        assert refused_by_qemu("qemu-img", "check", "-f", "qcow2", target).startswith(READS_WHAT_IS_WRITTEN)
        await job.cancel()
        await job.wait()
        await source.close()
        run("qemu-img", "info", "-f", format_of(image), image)


async def test_two_users_of_one_process_are_two_users(image):
    """The locks belong to open files, so two graphs see each other as two programs would."""
    async with blocklayer.Graph() as first, blocklayer.Graph() as second:
        node = await first.open(image, format=format_of(image))
        assert WRITES in await refusal(second, image)
        await node.close()
        assert await first_byte(second, image) == b"\x11"


async def test_an_image_that_is_created_over_one_in_use_is_left_alone(image):
    """Emptying it comes after its lock."""
    before = image.read_bytes()
    with qemu_holds(image):
        async with blocklayer.Graph() as graph:
            with pytest.raises(LockedError):
                await graph.create(image, format="qcow2", size=2 * MIB)
        assert image.read_bytes() == before
