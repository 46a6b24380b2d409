"""Runs on a kernel node, for test_kernel_mapping.py: maps images as an agent's worker does. A line of JSON in, one out."""

from __future__ import annotations

import json
import sys
import traceback

from atoll.model.errors import AtollError
from atoll.storage.rbd.mapping import choice, here, records
from atoll.storage.rbd.mapping.way import Image


def main() -> None:
    """For ever."""
    for line in sys.stdin:
        call = json.loads(line)
        try:
            reply = {"result": answer(call["call"], call.get("image"), call.get("way", ""), call.get("size", 0))}
        except AtollError as error:
            reply = {"error": type(error).__name__, "message": f"{error.message} Next: {error.hint}"}
        except Exception:  # noqa: BLE001 - the test must see it
            reply = {"error": "bug", "message": traceback.format_exc()}
        print(json.dumps(reply), flush=True)


def answer(call: str, image_: dict[str, str] | None, name: str, size: int) -> object:
    """One call."""
    if call == "available":
        return {way.name: way.available() for way in choice.ways()}
    image = Image.model_validate(image_)
    if call == "attach":
        return here.attach(image)
    if call == "detach":
        return here.detach(image.volume)
    way = choice.named(name)
    if call == "device":
        return way.device(image)
    with records.locked(image.volume):
        if call == "map":
            return way.map(image)
        if call == "unmap":
            return way.unmap(image)
        return way.resize(image, size)


if __name__ == "__main__":
    main()
