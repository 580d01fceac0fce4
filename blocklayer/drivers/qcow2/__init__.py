"""Layer ``drivers/qcow2``."""
