"""Scripts of OS definitions, mapped disks and exports, in simulated clusters."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from simsupport import EXPORT, check, dump, running, settle, stopped

from atoll.lab.box import Box, simulate
from atoll.model.errors import AlreadyExists, AtollError, HostError, InUse, InvalidInput, NotFound, NotSupported, WrongState
from atoll.model.objects import Claim, Instance, JobState, Volume
from atoll.model.units import GIB

DISKS = [{"size": GIB}]


def content(box: Box, name: str) -> Any:
    volume = box.master.state.store.find(Volume, name)
    return next(i["content"] for images in box.disks.images.values() for i in images.values() if i["volume"] == volume.id)


def instance_of(box: Box, name: str = "web1") -> Instance:
    return box.master.state.store.find(Instance, name)


async def begun(box: Box) -> str:
    """The node on which a script runs, once it does."""
    for _ in range(300):
        if box.disks.scripts:
            return next(iter(box.disks.scripts))[0]
        await asyncio.sleep(0.1)
    raise AssertionError("no script has begun")


def claim_of(box: Box) -> Claim:
    return box.master.state.claim(instance_of(box).id)


async def cluster(driver: str = "sharedfile") -> Box:
    box = await Box.make()
    await box.add_pool("shared", driver)
    return box


@pytest.mark.parametrize("driver", ["sharedfile", "file", "fakemirror"])
def test_the_create_script_has_written_the_disks_before_the_guest_starts(driver: str) -> None:
    async def run() -> None:
        box = await cluster(driver)
        secondary = {"secondary": "node2"} if driver == "fakemirror" else {}
        await box.do("instance.add", name="web1", disks=DISKS, node="node1", os="noop", os_parameters={"suite": "sid"}, **secondary)
        assert content(box, "web1-disk0") == "create noop web1"
        made = instance_of(box)
        assert (made.os, made.os_parameters, made.os_scripts) == ("noop", {"suite": "sid"}, True)
        assert claim_of(box).generation == 2, "one for the script, one for the guest"
        await box.do("instance.stop", "web1", timeout=1.0)
        await box.do("instance.rename", "web1", new_name="www")
        assert content(box, "www-disk0") == "rename noop www"
        await box.do("instance.start", "www")
        check(box)
        await box.close()

    simulate(run)


def test_without_scripts_the_os_is_a_note_and_a_rename_runs_none() -> None:
    async def run() -> None:
        box = await cluster()
        await box.do("instance.add", name="web1", disks=DISKS, node="node1", os="whatever", no_install=True, start=False)
        await box.do("instance.rename", "web1", new_name="www")
        assert (instance_of(box, "www").os, instance_of(box, "www").os_scripts) == ("whatever", False)
        with pytest.raises(NotFound, match="no OS definition whatever"):
            await box.do("instance.reinstall", "www")
        check(box)
        await box.close()

    simulate(run)


def test_a_script_that_fails_leaves_nothing_of_an_add_and_the_record_of_a_reinstall() -> None:
    async def run() -> None:
        box = await cluster()
        before = dump(box)
        with pytest.raises(HostError, match="it is broken"):
            await box.do("instance.add", name="web1", disks=DISKS, node="node1", os="broken")
        with pytest.raises(NotFound):
            await box.do("instance.add", name="web1", disks=DISKS, node="node1", os="nosuch")
        assert dump(box) == before
        await stopped(box, os="noop", os_parameters={"suite": "sid"})
        before = dump(box)
        with pytest.raises(HostError):
            await box.do("instance.reinstall", "web1", os="broken")
        assert dump(box) == before
        await box.do("instance.reinstall", "web1")
        assert content(box, "web1-disk0") == "create noop web1"
        assert instance_of(box).os_parameters == {"suite": "sid"}
        claim = claim_of(box)
        assert claim.holder is None, "it can be started anywhere"
        node = box.agents["node1"]
        assert node.memory.refused(instance_of(box).id) == claim.generation, "and a late copy of the script's order is refused"
        check(box)
        await box.close()

    simulate(run)


def test_what_runs_or_is_mapped_is_not_reinstalled_renamed_started_or_exported() -> None:
    async def run() -> None:
        box = await cluster()
        await running(box, os="noop")
        for operation, request in (("reinstall", {}), ("rename", {"new_name": "www"}), ("activate-disks", {}), ("export", EXPORT)):
            with pytest.raises(InUse):
                await box.do(f"instance.{operation}", "web1", **request)
        await box.do("instance.stop", "web1", timeout=1.0)
        await box.do("instance.activate-disks", "web1", node="node2")
        for operation, request in (("reinstall", {}), ("start", {}), ("export", EXPORT)):
            with pytest.raises((WrongState, InUse)):
                await box.do(f"instance.{operation}", "web1", **request)
        await box.do("instance.deactivate-disks", "web1")
        assert box.disks.mapped == {}
        await box.do("instance.start", "web1")
        check(box)
        await box.close()

    simulate(run)


def test_while_the_agent_of_a_script_is_silent_the_disks_are_nobody_elses() -> None:
    async def run() -> None:
        box = await cluster()
        await stopped(box)
        number = (await box.submit("instance.reinstall", "web1", os="noop")).job
        assert number is not None
        node = await begun(box)
        box.cut.add(node)
        await asyncio.sleep(30)
        await box.master.cancel_job(number)
        # The script runs on, or has run: only the node's own word frees the claim.
        await asyncio.sleep(600)
        assert claim_of(box).holder == box.nodes[node]
        job = box.master.engine.job(number)
        assert job.state in (JobState.UNDOING, JobState.NEEDS_ATTENTION), job.state
        with pytest.raises(AtollError):
            await asyncio.wait_for(box.do("instance.start", "web1", node="node3"), 60)
        box.cut.clear()
        await asyncio.sleep(30)
        if box.master.engine.job(number).state is JobState.NEEDS_ATTENTION:
            await box.master.undo_job(number)
        assert (await box.end_of(number)).state is JobState.UNDONE
        assert claim_of(box).holder is None
        await box.do("instance.start", "web1", node="node3")
        check(box)
        await box.close()

    simulate(run)


def test_the_node_of_a_script_dies_and_a_persons_word_frees_the_disks() -> None:
    async def run() -> None:
        box = await cluster()
        await stopped(box)
        number = (await box.submit("instance.reinstall", "web1", os="noop")).job
        assert number is not None
        node = await begun(box)
        await box.power_cut(node)
        await asyncio.sleep(30)
        await box.do("node.declare-dead", node)
        await box.master.cancel_job(number)
        if (await box.end_of(number)).state is JobState.NEEDS_ATTENTION:
            await box.master.undo_job(number)
        assert (await box.end_of(number)).state is JobState.UNDONE
        await box.do("instance.start", "web1")
        await settle(box)
        check(box)
        await box.close()

    simulate(run)


@pytest.mark.parametrize("how", ["script", "by hand"])
def test_a_node_that_was_called_dead_in_error_gives_up_the_disks_when_it_returns(how: str) -> None:
    async def run() -> None:
        box = await cluster()
        await stopped(box)
        if how == "script":
            number = (await box.submit("instance.reinstall", "web1", os="noop")).job
            node = await begun(box)
        else:
            await box.do("instance.activate-disks", "web1", node="node2")
            number, node = None, "node2"
        box.cut.add(node)
        await asyncio.sleep(30)
        await box.do("node.declare-dead", node)
        if number is not None:
            await box.master.cancel_job(number)
            assert (await box.end_of(number)).state is JobState.UNDONE
        other = "node3" if node != "node3" else "node1"
        assert [key for key in box.disks.mapped if key[0] == node], "it has them still"
        await box.do("instance.failover" if how == "by hand" else "instance.start", "web1", node=other)
        # The person was wrong: from here to the node's return there were two.
        box.world.violations.clear()
        box.cut.clear()
        await settle(box, 60.0)
        assert box.disks.mapped == {}
        assert box.master.state.answers(box.nodes[node])
        check(box)
        await box.close()

    simulate(run)


def test_an_export_is_made_once_and_comes_back_with_its_parameters() -> None:
    async def run() -> None:
        box = await cluster()
        await running(box, nics=[{"mac": "52:54:00:00:00:01"}], vcpus=3, tags=["blue"], os="noop")
        await box.do("instance.export", "web1", **EXPORT, shutdown=True)
        assert instance_of(box).desired == "running"
        with pytest.raises(AlreadyExists):
            await box.do("instance.export", "web1", **EXPORT, shutdown=True)
        await box.do("instance.export", "web1", **EXPORT, shutdown=True, overwrite=True)
        await box.do("instance.import", name="web2", **EXPORT, start=False)
        old, new = instance_of(box), instance_of(box, "web2")
        for field in ("memory", "vcpus", "boot", "os", "os_parameters", "os_scripts", "tags"):
            assert getattr(new, field) == getattr(old, field), field
        assert new.nics[0].mac != old.nics[0].mac, "two cards with one address"
        assert [content(box, f"web2-disk{n}")[0] for n in range(2)] == ["create noop web1"] * 2
        await box.do("instance.remove", "web1", timeout=1.0)
        await box.do("instance.import", name="web1", **EXPORT)
        assert instance_of(box).nics == old.nics
        check(box)
        await box.close()

    simulate(run)


def test_disks_without_files_are_neither_exported_nor_filled_from_one() -> None:
    async def run() -> None:
        box = await cluster()
        await stopped(box)
        await box.do("instance.export", "web1", **EXPORT)
        await box.do("pool.add", name="ceph", driver="rbd", options={"pool": "box"})
        await box.do("instance.add", name="web5", disks=[{"size": GIB, "pool": "ceph"}], start=False)
        before = dump(box)
        with pytest.raises(NotSupported, match="pool ceph has no files"):
            await box.do("instance.export", "web5", **{**EXPORT, "path": "/srv/web5.atoll"})
        with pytest.raises(NotSupported, match="pool ceph has no files"):
            await box.do("instance.import", name="web6", **EXPORT, template="ceph")
        assert dump(box) == before
        check(box)
        await box.close()

    simulate(run)


def test_an_export_that_does_not_fit_here_is_refused_without_a_trace() -> None:
    async def run() -> None:
        box = await cluster()
        await stopped(box)
        await box.do("instance.export", "web1", **EXPORT)
        await box.add_pool("local", "file")
        before = dump(box)
        with pytest.raises(AlreadyExists):
            await box.do("instance.import", name="web1", **EXPORT)
        with pytest.raises(NotFound):
            await box.do("instance.import", name="web2", **{**EXPORT, "path": "/srv/nothing"})
        manifest = box.disks.exports["node2", EXPORT["path"]]["manifest"]
        manifest["disks"][0]["pool"] = "elsewhere"
        with pytest.raises(InvalidInput, match="no pool 'elsewhere'"):
            await box.do("instance.import", name="web2", **EXPORT)
        manifest["instance"]["memory"] = -1
        with pytest.raises(InvalidInput, match="cannot be made here"):
            await box.do("instance.import", name="web2", **EXPORT, template="local")
        assert dump(box) == before
        check(box)
        await box.close()

    simulate(run)
