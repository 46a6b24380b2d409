"""The master: decides. Wiring and loops; what can be asked for is in ``operations``."""
