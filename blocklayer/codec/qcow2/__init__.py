"""Layer ``codec/qcow2``."""
