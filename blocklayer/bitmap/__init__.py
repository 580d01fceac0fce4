"""Layer ``bitmap``."""
