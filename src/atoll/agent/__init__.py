"""The agent: one per node. Does what the master asks, idempotently, and remembers only what fencing needs."""
