"""Layer ``graph``: nodes, edges, the request path, block status, drain, and the contracts of drivers."""
