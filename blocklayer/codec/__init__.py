"""Layer ``codec``."""
