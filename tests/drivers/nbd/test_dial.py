"""Connected sockets: hosts, Unix sockets, and what is said when nobody is there."""

from __future__ import annotations

import errno
import socket

import pytest

from blocklayer.base.errors import IOFailedError, MissingFileError
from blocklayer.drivers.nbd.dial import connect


async def test_each_address_of_a_host_is_tried():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with await connect(("localhost", listener.getsockname()[1])) as sock:
            assert sock.getpeername() == listener.getsockname()
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert not sock.getblocking()


async def test_a_unix_socket_and_one_without_a_file(tmp_path):
    for address in (str(tmp_path / "socket"), f"\0{tmp_path.name}-abstract"):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen()
            (await connect(address)).close()


async def test_nobody_there(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(IOFailedError, match=f"127.0.0.1:{port}") as caught:
            await connect(("127.0.0.1", port))
        assert caught.value.errno == errno.ECONNREFUSED
    with pytest.raises(MissingFileError, match="socket"):
        await connect(str(tmp_path / "socket"))


async def test_a_host_that_is_not_known():
    with pytest.raises(IOFailedError, match=r"'no\.such\.host\.invalid' is not known"):
        await connect(("no.such.host.invalid", 1))


async def test_a_full_queue_is_not_a_connection(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with await connect(path), pytest.raises(IOFailedError):
            (await connect(path)).close()
