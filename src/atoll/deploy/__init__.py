"""Nodes into a storage cluster."""
