"""A NoCloud seed for cloud-init: sealed in the job, a small disk of the instance in the end."""

from __future__ import annotations

import json
from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Undo
from atoll.model.errors import InvalidInput
from atoll.model.units import MIB
from atoll.operations.image_requests import CloudInit
from atoll.operations.state import State

#: Bytes of a seed's disk: room for the largest request, and a size that every driver can make.
SIZE = 4 * MIB


def name_of(instance: str) -> str:
    """The seed's volume of an instance with this name."""
    return f"{instance}-seed"


def sealed(state: State, given: CloudInit | None, instance: str) -> dict[str, Any] | None:
    """What a job keeps of it. Errors: InvalidInput (it cannot be understood)."""
    if given is None:
        return None
    if given.sealed:
        # The request of a job that waited for its locks; only this cluster's own key opens it.
        _opened(state, given.sealed, instance)
        return {"sealed": given.sealed}
    if given.ssh_keys and "public-keys" in given.meta_data:
        raise InvalidInput("the meta data has public-keys already", hint="leave --ssh-key away, or public-keys in the meta data")
    plain = given.model_dump_json(exclude={"sealed"}).encode()
    return {"sealed": state.secrets.seal(plain, _context(instance))}


def _context(instance: str) -> str:
    return f"cloud-init:{instance}"


def _opened(state: State, text: str, instance: str) -> CloudInit:
    return CloudInit.model_validate_json(state.secrets.open(text, _context(instance)))


def files(given: CloudInit, name: str, instance: str) -> dict[str, str]:
    """The files of the seed, by name. cloud-init takes another instance-id for a new machine, and does its first boot again."""
    own = {"instance-id": json.dumps(instance), "local-hostname": json.dumps(name)}
    if given.ssh_keys:
        own["public-keys"] = json.dumps(given.ssh_keys)
    meta = given.meta_data
    if not meta.lstrip().startswith("{"):
        present = {line.partition(":")[0].strip() for line in meta.splitlines()}
        missing = [f"{key}: {value}\n" for key, value in own.items() if key not in present]
        meta = "".join(missing) + meta
    found = {"meta-data": meta, "user-data": given.user_data or "#cloud-config\n{}\n"}
    if given.network_config:
        found["network-config"] = given.network_config
    return found


async def write(job: JobContext, request: dict[str, Any], instance: str, volume: str, place: tuple[str, dict[str, Any]], disk: str) -> None:
    """Write the seed into its new volume; ``disk`` is its logical id. The journal keeps a hash of the order, not what is in it."""
    node, ref = place
    found = files(_opened(job.state, request["cloud_init"]["sealed"], request["name"]), request["name"], instance)
    args = {"ref": ref, "logical_id": disk, "volume": volume, "files": found}
    undo = Undo("image.unimport", {"volume": volume}, node=node, dies=True)
    await job.call("write the seed", node, "seed.write", args, undo=undo, deadline=120.0)
