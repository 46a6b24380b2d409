"""Running the scripts of OS definitions on an instance's disks, as steps of a larger job."""

from __future__ import annotations

from typing import Any

from atoll.jobs.context import JobContext
from atoll.jobs.steps import Undo
from atoll.model.objects import Instance
from atoll.operations.running import activate_on, release_from, revoke_rights, sync_copies
from atoll.operations.state import State


async def check_definition(job: JobContext, instance: str, node: str, os: str, parameters: dict[str, str]) -> None:
    """Refuse a definition that the node does not have, or that does not take these parameters, before anything is begun.

    Errors: NotFound, InvalidInput.
    """
    args = {"instance": instance, "os": os, "parameters": parameters}
    await job.look("look at the OS definition", node, "os.check", args, accept=lambda answer: None, deadline=90.0)


def _spec(state: State, instance: str, paths: dict[str, str], extra: dict[str, Any]) -> dict[str, Any]:
    """What a script is told of the instance."""
    found = state.store.require(Instance, instance)
    disks = [
        {"volume": volume.id, "name": volume.name, "size": volume.size, "mode": disk.mode, "path": paths[volume.id]}
        for disk, volume in state.volumes_of(found)
    ]
    return {
        "instance": instance,
        "name": found.name,
        "os": found.os,
        "memory": found.memory,
        "vcpus": found.vcpus,
        "hypervisor": found.hypervisor,
        "disks": disks,
        "nics": [nic.model_dump(mode="json") for nic in found.nics],
        **extra,
    }


async def run_script(
    job: JobContext,
    instance: str,
    node: str,
    action: str,
    timeout: float,
    *,
    span: tuple[float, float] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Run a script of the instance's OS definition (create, rename) on its node with the disks mapped, under a generation of its own.

    The claim is free afterwards: the agent has said that the script is gone, that nothing is mapped, and that it refuses the generation.
    A script that was broken off by the death of its agent is run again from its beginning. Its undo ends it; what it wrote stays.
    Errors: those of ``activate_on``; HostError with the end of its words.
    """
    suffix = f" for the {action} script"
    if span:
        job.progress(span[0], f"mapping the disks for the {action} script")
    generation, paths = await activate_on(job, instance, node, suffix=suffix)
    spec = await job.read("what the script is told", lambda: _spec(job.state, instance, paths, extra or {}))
    parameters = await job.read("its parameters", lambda: job.state.store.require(Instance, instance).os_parameters)
    args = {"generation": generation, "action": action, "os": spec["os"], "parameters": parameters, "spec": spec, "timeout": timeout}
    undo = Undo("os.unrun", {"instance": instance}, node=node, dies=True, deadline=90.0)
    await job.call(f"run the {action} script", node, "os.run", args, undo=undo, deadline=timeout + 60.0, span=span)
    await job.call(f"deactivate{suffix}", node, "disks.deactivate", {"owner": instance})
    await sync_copies(job, instance, node, suffix=suffix)
    await release_from(job, instance, node, suffix=suffix)
    await revoke_rights(job, instance, node, suffix=suffix)
