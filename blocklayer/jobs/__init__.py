"""Layer ``jobs``."""
