"""Kernel nodes: lab nodes with a Linux of their own, in an emulated machine whose root is this machine's. See ``node.py``."""
