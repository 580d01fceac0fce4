"""Layer ``graph``."""
