"""The qcow2 format: opening, mapping, allocation, ordered write-back, compression, creation and repair."""

from blocklayer.drivers.qcow2.driver import Qcow2Driver

__all__ = ["Qcow2Driver"]
