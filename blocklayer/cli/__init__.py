"""Layer ``cli``."""
