"""Filling a new volume from an image file of some node, as steps of a larger job."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Undo
from atoll.model.errors import InvalidSize, NodeUnavailable
from atoll.model.objects import Node, Pool
from atoll.model.units import format_size
from atoll.operations.common import check_size_for
from atoll.operations.state import State

#: Seconds that copying one image may take, and a job that does.
LONG, DAY = 82800.0, 86400.0


def plan_image(state: State, image: dict[str, Any]) -> dict[str, Any]:
    """Where the image is: the node's id and name beside path and format. Errors: NotFound, NodeUnavailable."""
    node = state.store.find(Node, image["node"])
    if node.offline or not state.answers(node.id):
        why = "is offline" if node.offline else "does not answer"
        raise NodeUnavailable(f"node {node.name}, which has the image {image['path']}, {why}", hint="atoll node list")
    return {"node": node.id, "node_name": node.name, "path": image["path"], "format": image["format"]}


async def look_at_image(job: JobContext, plan: dict[str, Any]) -> tuple[int, str]:
    """The size of the new volume: what was asked for, if the image fits into it, else the image's own; and the image's format, which
    is fixed from here on. Nothing has been begun yet.

    Errors: InvalidInput (not an image, or one that refers to other files), InvalidSize.
    """
    volume, image = plan["volume"], plan["image"]

    def accept(found: dict[str, Any]) -> None:
        if plan["size"] and plan["size"] < found["size"]:
            raise InvalidSize(
                f"the disk in {image['path']} has {format_size(found['size'])} ({found['size']} bytes); {format_size(plan['size'])} are "
                "too small for it",
                hint="leave the size away to get a disk of the image's size",
            )

    args = {"path": image["path"], "format": image["format"]}
    found = await job.look(f"look at the image/{volume}", image["node"], "image.look", args, accept=accept)

    def size() -> int:
        state: State = job.state
        driver = state.driver(state.store.require(Pool, plan["pool"]))
        return check_size_for(driver, plan["size"] or found["size"])

    return await job.read(f"size by the image/{volume}", size), found["format"]


async def fill(
    job: JobContext,
    plan: dict[str, Any],
    kind: str,
    place: tuple[str, dict[str, Any]],
    logical_id: str,
    span: tuple[float, float] | None,
) -> None:
    """Copy the image into the new volume: where both are one node's, directly; else over TLS, as a disk that moves.

    Its undo ends the copying; the volume's own removes what was written.
    """
    volume, image = plan["volume"], plan["image"]
    node, ref = place
    key = f"import/{volume}"
    # The kind is as it was found first: the agent looks again, and refuses what has become something else.
    disk = {"ref": ref, "logical_id": logical_id, "volume": volume}
    source = {"path": image["path"], "format": kind}
    undo = Undo("image.unimport", {"volume": volume}, node=image["node"], dies=True)
    if node == image["node"]:
        await job.call(key, node, "image.import", {**disk, **source}, undo=undo, deadline=LONG, span=span)
        return
    serve = {**disk, "peer": image["node_name"]}
    unserve = Undo("copy.unserve", {"volume": volume}, node=node, dies=True)
    port = await job.call(f"serve for {key}", node, "copy.serve", serve, undo=unserve)
    address = await job.read(f"address for {key}", lambda: job.state.store.require(Node, node).address)
    push = {**source, "volume": volume, "host": address, "port": port, "server": ref["node"]}
    await job.call(key, image["node"], "image.push", push, undo=undo, deadline=LONG, span=span)
    await job.call(f"end of {key}", node, "copy.unserve", {"volume": volume})
