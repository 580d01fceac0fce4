"""Disks of NBD servers as nodes."""
