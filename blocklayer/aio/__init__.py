"""Layer ``aio``."""
