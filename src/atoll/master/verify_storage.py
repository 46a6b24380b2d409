"""What ``cluster verify`` finds of storage: pools that do not answer, guests that their storage stopped, images that do not fit."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from atoll.api.leader import Finding
from atoll.master.inspect import differing
from atoll.master.verify_snapshots import SnapshotFindings
from atoll.model.errors import AtollError, Conflict
from atoll.model.messages import PoolStatus
from atoll.model.objects import Instance, Node, Pool, Volume, VolumeState
from atoll.model.places import OPEN_DIRECTORY, lies_in
from atoll.operations import trouble
from atoll.operations.index import Index

if TYPE_CHECKING:
    from atoll.jobs.engine import Engine
    from atoll.operations.state import State
    from atoll.rpc.agents import Agents

#: Seconds that an agent has to list a pool; and one whose storage is silent on another node, and so perhaps on this one.
PATIENCE, IMPATIENCE = 15.0, 3.0
#: How many of other people's files are named.
SHOWN = 5


class StorageFindings:
    """Compares records with what agents report and what the storage shows. ``working_on``: whether a job has to do with a volume id."""

    def __init__(self, state: State, agents: Agents, engine: Engine, working_on: Callable[[str], bool]) -> None:
        self._state, self._agents, self._engine, self._working_on = state, agents, engine, working_on
        #: Volumes whose images were deleted under their guests.
        self._open: set[str] = set()

    async def look(self) -> list[Finding]:
        """All findings."""
        found = [*self._stalled(), *self._stopped_guests(), *await self._deleted()]
        found += SnapshotFindings(self._state, self._engine, self._working_on).records()
        # All pools at a time: one that is slow holds up none of the others.
        for findings in await asyncio.gather(*(self._pool(pool) for pool in self._state.store.all(Pool))):
            found += findings
        return found

    # --- from the agents' reports ---

    def _stalled(self) -> list[Finding]:
        found = []
        for node in self._state.store.all(Node):
            report = self._state.health.report(node.id)
            if report is None or not self._state.health.alive(node.id):
                continue
            for pool, reason in report.stalled_pools.items():
                record = self._state.store.get(Pool, pool)
                name = record.name if record else pool
                since = report.stalled_for.get(pool)
                commands = (f"atoll pool info {name}", f"on {node.name}: look at the mount and the kernel log (dmesg | tail)")
                found.append(Finding("error", "pool is stalled on a node", f"{name} on {node.name}", reason, since, commands))
        return found

    def _stopped_guests(self) -> list[Finding]:
        found = []
        index = Index(self._state)
        for instance in self._state.store.all(Instance):
            holder = self._state.claim(instance.id).holder
            guest = index.guests.get((holder, instance.id)) if holder and self._state.health.alive(holder) else None
            if guest is not None and guest.state == "paused" and guest.reason.startswith(trouble.IO_ERROR):
                about = f"{instance.name} on {index.node_name(holder)}"
                commands = tuple(trouble.commands(instance, guest, index))
                found.append(Finding("error", "guest stands still: io-error", about, trouble.why(guest, index), None, commands))
        return found

    # --- from the storage ---

    async def _deleted(self) -> list[Finding]:
        """Images deleted (or replaced) by hand under their guests: found by what the guests have open."""
        nodes = [n for n in self._state.store.all(Node) if self._state.health.alive(n.id)]
        answers = await asyncio.gather(*(self._ask(n.id, "guest.deleted", {}, IMPATIENCE) for n in nodes))
        found = []
        for node, answer in zip(nodes, answers, strict=True):
            for image in answer if isinstance(answer, list) else ():
                volume = self._state.store.get(Volume, image["volume"])
                instance = self._state.store.get(Instance, image["instance"])
                if volume is None or instance is None:
                    continue
                self._open.add(volume.id)
                why = f"{image['path']} was deleted; its data is there until guest {instance.name} ends: do not stop it before this:"
                commands = (
                    f"on {node.name}: kill -STOP {image['pid']}",
                    f"on {node.name}: cp --sparse=always /proc/{image['pid']}/fd/{image['fd']} {image['path']}.saved",
                    f"on {node.name}: mv {image['path']}.saved {image['path']}",
                    f"atoll instance stop {instance.name} --timeout 0",
                    f"atoll instance start {instance.name}",
                )
                found.append(Finding("error", "image was deleted under its guest", f"{volume.name} on {node.name}", why, None, commands))
        return found

    async def _pool(self, pool: Pool) -> list[Finding]:
        state = self._state
        local = state.driver(pool).node_local
        nodes = [n for n in state.managers(state.driver(pool), pool.groups) if state.health.alive(n.id) and not n.offline]
        # Those where it is stalled are told of already, and an answer from there would have to be waited for in vain.
        silent = [n for n in nodes if state.stalled(pool, n)]
        nodes, patience = [n for n in nodes if n not in silent], IMPATIENCE if silent else PATIENCE
        found: list[Finding] = []
        usable: list[Node] = []
        kinds: dict[str, str] = {}
        for node, answer in zip(nodes, await asyncio.gather(*(self._check(pool, n, patience) for n in nodes)), strict=True):
            if not answer.ok:
                hint = (f"on {node.name}: {answer.hint}",) if answer.hint and not answer.hint.startswith("atoll") else ()
                commands: tuple[str, ...] = (f"atoll pool check {pool.name}", *hint)
                about = f"{pool.name} on {node.name}"
                found.append(Finding("error", "pool cannot be used on a node", about, answer.reason, None, commands))
            else:
                usable.append(node)
            kinds[node.name] = answer.details.get("file system", "")
            found += self._moved(pool, node, answer)
        found += self._place(pool, {} if local else kinds)
        if pool.observed:
            return found  # what is in it is not for us to judge
        for node in usable if local else usable[:1]:
            ref = state.ref(pool, node).model_dump(mode="json")
            images = await self._ask(node.id, "volume.list", {"ref": ref}, patience)
            if isinstance(images, AtollError):
                commands = (f"atoll pool check {pool.name}",)
                found.append(Finding("error", "pool cannot be listed", f"{pool.name} on {node.name}", images.message, None, commands))
                continue
            if state.driver(pool).snapshots:
                found += await self._snapshots(pool, node, ref, patience)
            compared = Images(state, self._engine, pool, node, images, self._working_on)
            found += [*compared.orphans(), *compared.sizes(), *compared.foreign()]
            for volume in compared.missing():
                if volume.id not in self._open:
                    found.append(await self._missing(compared, volume, ref, patience))
        return found

    async def _snapshots(self, pool: Pool, node: Node, ref: dict[str, Any], patience: float) -> list[Finding]:
        """Snapshots in the pool, and what was deleted and is still there."""
        findings = SnapshotFindings(self._state, self._engine, self._working_on)
        found: list[Finding] = []
        looks = {"snapshot.list": findings.compared, "snapshot.waiting": findings.waiting}
        for method, compare in looks.items():
            answer = await self._ask(node.id, method, {"ref": ref}, patience)
            if isinstance(answer, AtollError):
                commands = (f"atoll pool check {pool.name}",)
                what = "the pool's snapshots cannot be listed"
                found.append(Finding("error", what, f"{pool.name} on {node.name}", answer.message, None, commands))
            else:
                found += compare(pool, answer)
        return found

    async def _check(self, pool: Pool, node: Node, patience: float) -> PoolStatus:
        """How the pool is on the node."""
        answer = await self._ask(node.id, "pool.check", {"ref": self._state.ref(pool, node).model_dump(mode="json")}, patience)
        return PoolStatus(ok=False, reason=answer.message) if isinstance(answer, AtollError) else PoolStatus(**answer)

    def _moved(self, pool: Pool, node: Node, status: PoolStatus) -> list[Finding]:
        """The mark came along with a copy, or the share is another one now."""
        now, then = status.details.get("file system", ""), status.details.get("marked on", "")
        if not status.ok or not now or not then or now == then:
            return []
        why = f"the directory lies on {now}; when the pool was made, it lay on {then}: is this its share, or a copy below the mount point?"
        commands = (f"on {node.name}: findmnt -T {pool.options.get('path', '')}", f"atoll pool info {pool.name}")
        return [Finding("warning", "pool is on another file system", f"{pool.name} on {node.name}", why, None, commands)]

    def _place(self, pool: Pool, kinds: dict[str, str]) -> list[Finding]:
        """Where its directory lies: the same everywhere (``kinds``: node -> file system), and not where others may read."""
        found = []
        path = pool.options.get("path", "")
        if differ := differing(kinds):
            why = f"{differ}: not the same directory, or not mounted the same way"
            found.append(Finding("error", "pool differs between nodes", pool.name, why, None, (f"on each: findmnt -T {path}",)))
        if path and lies_in(path, OPEN_DIRECTORY):
            why = f"it lies in {OPEN_DIRECTORY}: whoever may make instances can import, and so read, every disk in it"
            commands = (f"atoll pool modify {pool.name} --close", "move its instances to another pool")
            found.append(Finding("error", "pool can be read by operators", pool.name, why, None, commands))
        return found

    async def _missing(self, compared: Images, volume: Volume, ref: dict[str, Any], patience: float) -> Finding:
        """An image that is not among the pool's files: it is gone, or something else is in its place."""
        answer = await self._ask(compared.node.id, "volume.stat", {"ref": ref, "logical_id": volume.logical_id}, patience)
        about = f"{volume.name} in {compared.place}"
        if isinstance(answer, Conflict):
            where = compared.pool.options.get("path", "the pool's directory")
            look = f"on {compared.node.name}: ls -l {where}/{volume.logical_id}"
            why = f"{answer.message}; put the image itself there"
            return Finding("error", "what is there is no image", about, why, None, (look,))
        owner = self._state.store.get(Instance, volume.instance or "")
        new = f"atoll instance recreate {owner.name}" if owner else f"atoll volume delete {volume.name}"
        why = f"{volume.logical_id} is not there; put it back from a backup, or {'make an empty disk' if owner else 'drop its record'}"
        return Finding("error", "image is missing", about, why, None, (new,))

    async def _ask(self, node: str, method: str, args: dict[str, Any], patience: float) -> Any:
        """The agent's answer, or its error."""
        try:
            return await self._agents.ask(node, method, args, deadline=patience)
        except AtollError as error:
            return error


class Images:
    """What lies in a pool (on a node, where it is node-local), beside what the records say."""

    def __init__(
        self, state: State, engine: Engine, pool: Pool, node: Node, images: list[dict[str, Any]], working_on: Callable[[str], bool]
    ) -> None:
        self._state, self._engine, self._images, self._working_on = state, engine, images, working_on
        self.pool, self.node, self._local = pool, node, state.driver(pool).node_local
        self.place = f"{pool.name} on {node.name}" if self._local else pool.name
        volumes = [v for v in state.store.all(Volume) if v.pool == pool.id and (not self._local or node.id in (v.node, v.secondary))]
        self._known = {v.logical_id: v for v in volumes}
        self._owned = {v.id for v in volumes}

    def orphans(self) -> list[Finding]:
        """Images with names of ours that no volume owns."""
        found = []
        for image in self._images:
            name, volume = image["logical_id"], image["volume"]
            if not volume or volume in self._owned or name in self._known or self._working_on(volume):
                continue
            why = "an image with one of our names that no volume owns"
            commands: tuple[str, ...] = (f"keep it: {self._adopt(name)}", "or delete the file")
            if name.startswith("."):
                why, commands = "what an interrupted creation has left; no volume owns it", (f"on {self.node.name}: rm {name}",)
            found.append(Finding("warning", "orphan image", f"{name} in {self.place}", why, self._age(image), commands))
        return found

    def sizes(self) -> list[Finding]:
        """Images whose size is not their volume's."""
        found = []
        for image in self._images:
            volume = self._known.get(image["logical_id"])
            if volume is None or volume.size == image["size"] or self._engine.busy(volume.resource):
                continue
            why = f"the record says {volume.size} bytes, the image has {image['size']}"
            size = max(volume.size, -(-image["size"] // 512) * 512)
            owner = self._state.store.get(Instance, volume.instance or "")
            index = next((n for n, d in enumerate(owner.disks) if d.volume == volume.id), 0) if owner else 0
            fix = f"atoll instance grow-disk {owner.name} {index}" if owner else f"atoll volume grow {volume.name}"
            commands: tuple[str, ...] = (f"{fix} {size}B --absolute",)
            if image["size"] < volume.size:
                why += ": its end was cut off, and what was there is gone; put it back from a backup, or fill it up with zeros"
                found.append(Finding("error", "image was cut off", volume.name, why, self._age(image), commands))
            else:
                found.append(Finding("warning", "size differs", volume.name, why, self._age(image), commands))
        return found

    def foreign(self) -> list[Finding]:
        """Files that are not Atoll's, all in one finding: they are left alone, and may be adopted."""
        names = [image["logical_id"] for image in self._images if not image["volume"] and image["logical_id"] not in self._known]
        if not names:
            return []
        many = f"{len(names)} files" if len(names) > 1 else "a file"
        why = f"{', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}: left alone"
        commands = (f"to make a volume of it: {self._adopt(names[0])}",)
        return [Finding("info", f"{many} of other people", self.place, why, None, commands)]

    def missing(self) -> list[Volume]:
        """Volumes whose image is not among the files."""
        present = {image["logical_id"] for image in self._images}
        states = (VolumeState.AVAILABLE, VolumeState.IN_USE)
        found = [v for name, v in self._known.items() if name and name not in present and v.state in states]
        return [v for v in found if not self._engine.busy(v.resource)]

    def _adopt(self, name: str) -> str:
        quoted = shlex.quote(name)
        return f"atoll volume create --pool {self.pool.name} --adopt {quoted}" + (f" -n {self.node.name}" if self._local else "")

    def _age(self, image: dict[str, Any]) -> float | None:
        return self._state.clock.now() - image["modified"] if image["modified"] else None
