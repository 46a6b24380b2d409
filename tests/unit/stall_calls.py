"""Driver calls for test_storage_stall.py: they give no answer as long as there is a file ``hangs`` in the pool's directory."""

import os
import time
from pathlib import Path
from typing import Any

from atoll.model.errors import PoolUnavailable


def pool(ref: dict[str, Any], method: str, args: dict[str, Any]) -> Any:
    place = Path(ref["options"]["path"])
    (place / "asked").open("a").write(f"{method}\n")
    while (place / "hangs").exists() or (method in ("create", "probe_writers") and not (place / "made").exists()):
        time.sleep(0.02)
    if (place / "slow").exists():
        time.sleep(1.2)
    if (place / "silent").exists():
        raise PoolUnavailable("it gives no answer", silent=True)
    return os.getpid()


def connector(driver: str, method: str, args: dict[str, Any]) -> Any:
    return pool({"options": {"path": args["connection"]["data"]["path"]}}, method, args)


FUNCTIONS = {"pool": pool, "connector": connector}
