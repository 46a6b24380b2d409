"""Translate what comes over the wire to operations. The leader is handed in."""
