"""Ways in which others reach a node: the NBD server."""
