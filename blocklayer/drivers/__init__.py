"""Layer ``drivers``."""
