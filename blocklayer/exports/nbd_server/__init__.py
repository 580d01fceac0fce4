"""NBD server: exports disks to anybody who speaks the protocol; see ``server.py``."""

from blocklayer.exports.nbd_server.contexts import MetaContext, Run
from blocklayer.exports.nbd_server.export import ExportStatistics, NbdExport
from blocklayer.exports.nbd_server.server import NbdServer, ServerLimits

__all__ = ["NbdServer", "NbdExport", "ServerLimits", "ExportStatistics", "MetaContext", "Run"]
