"""Disks of NBD servers as nodes: connections, reconnecting, and the driver."""

from blocklayer.drivers.nbd.driver import NbdDriver

__all__ = ["NbdDriver"]
