"""Where things go: rules say where they may, a score says where they should."""
