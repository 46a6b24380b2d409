"""The REST API: ``/v1`` for people and programs, ``/agent/v1`` for nodes."""
