"""The node half: the behaviour of files."""

from atoll.storage.files.connector import FileConnector as Connector

__all__ = ["Connector"]
