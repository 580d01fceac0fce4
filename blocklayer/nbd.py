"""NBD: disks over the network block device protocol, for whoever speaks it (QEMU, libnbd, nbdkit, the Linux kernel).

    async with NbdServer() as server:
        server.add(NbdExport("disk", node, writable=True))
        await server.listen_unix("/run/disk.sock")

The server needs no ``Graph``: whatever answers like a ``Node`` can be exported (``Disk``).
"""

from __future__ import annotations

from blocklayer.exports.nbd_server.contexts import MetaContext, Run
from blocklayer.exports.nbd_server.disk import Disk
from blocklayer.exports.nbd_server.export import ExportStatistics, NbdExport
from blocklayer.exports.nbd_server.server import NbdServer, ServerLimits
from blocklayer.exports.nbd_server.tls import ServerTls

__all__ = ["NbdServer", "NbdExport", "ServerLimits", "ServerTls", "ExportStatistics", "Disk", "MetaContext", "Run"]
