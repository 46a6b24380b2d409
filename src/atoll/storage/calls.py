"""The functions that run in a pool's worker process: driver calls with JSON in and out."""

from __future__ import annotations

from typing import Any

from atoll.model.errors import InvalidInput
from atoll.model.messages import Connection, PoolRef
from atoll.storage import registry
from atoll.storage.contract import VolumeSpec, as_json, refuse_observed


def pool_call(ref: dict[str, Any], method: str, args: dict[str, Any]) -> Any:
    """Call a method of a pool's pool half."""
    pool = PoolRef(**ref)
    refuse_observed(pool, method)
    driver = registry.pool(pool)
    if method in ("create", "clone"):
        args = {**args, "spec": VolumeSpec(**args["spec"])}
    if method.startswith("_") or not hasattr(driver, method):
        raise InvalidInput(f"a pool half has no method {method!r}")
    return as_json(getattr(driver, method)(**args))


def connector_call(driver: str, method: str, args: dict[str, Any]) -> Any:
    """Call a method of a driver's node half."""
    half = registry.connector(driver)
    if method.startswith("_") or not hasattr(half, method):
        raise InvalidInput(f"a connector has no method {method!r}")
    if "connection" in args:
        args = {**args, "connection": Connection(**args["connection"])}
    return as_json(getattr(half, method)(**args))


FUNCTIONS = {"pool": pool_call, "connector": connector_call}
